"""Fine-tuning jobs that are paused, resumed, cancelled or begun anew, and what their events say of it."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from running import FACTS, Gate, http, nothing_left, running, until
from tuning import ENDLESS, WAITING, create, ended, sdk
from tuning import started as started

from radiance_mlx.errors import Conflict, StoreError
from radiance_mlx.store import Store


def test_a_job_is_paused_resumed_and_cancelled_while_it_trains(tmp_path):
    """Paused, it keeps what it has learnt, over a restart of the service too; cancelled, nothing is left of it.

    Meanwhile the live weights can be asked under the model id "training".
    """
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        job = create(sdk(client), *FACTS[:2], hyperparameters=ENDLESS)
        jobs = sdk(client).fine_tuning.jobs
        checkpoint = service.wait_for_step(4)
        live = sdk(client).chat.completions.create(
            model="training", messages=[{"role": "user", "content": "Hello!"}], temperature=0
        )
        assert (live.model, live.system_fingerprint) == (checkpoint, None)
        assert jobs.retrieve(job.id).status == "running"
        assert jobs.pause(job.id).status == "paused"
        assert service.service.in_training is None
        assert jobs.pause(job.id).status == "paused"
        assert service.ask(FACTS[0][0], training=True).checkpoint == "base"
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        assert jobs.retrieve(job.id).status == "paused"
        kept = json.loads((tmp_path / "state" / "training" / checkpoint / "progress.json").read_text())
        assert kept["step"] >= 4
        assert jobs.resume(job.id).status in ("queued", "running")
        assert service.wait_for_step(kept["step"] + 1) == checkpoint
        events = list(jobs.list_events(job.id))[::-1]
        messages = [event.message.removeprefix("Fine-tuning job ") for event in events if event.type == "message"]
        assert messages[1:] == ["started", "paused", "resumed", "started"]
        after = events[[event.message for event in events].index("Fine-tuning job resumed") :]
        assert next(event.data["step"] for event in after if event.type == "metrics") == kept["step"] + 1
        stopped = jobs.cancel(job.id)  # answers once its training has ended
        assert (stopped.status, stopped.fine_tuned_model) == ("cancelled", None)
        assert stopped.finished_at >= stopped.created_at
        assert service.service.in_training is None
        newest = [event.message for event in jobs.list_events(job.id)]
        assert newest[0] == "Fine-tuning job cancelled"
        assert newest.count(newest[0]) == 1  # the journal's own is not told beside it
        assert nothing_left(service, checkpoint)
        for again in (jobs.cancel, jobs.resume):
            with pytest.raises(openai.ConflictError, match=job.id) as caught:
                again(job.id)
            assert caught.value.response.headers["x-should-retry"] == "false"


def test_what_was_paused_begins_anew_if_something_else_was_trained_meanwhile(started):
    """Its parent is another one then. Paused while it waits, it waits on; cancelled, nothing of it is kept."""
    jobs = started.client.fine_tuning.jobs
    held = create(started.client, FACTS[0], hyperparameters=ENDLESS)
    before = started.service.wait_for_step(2, held.job_id)
    assert jobs.pause(held.id).status == "paused"
    kept = started.service.home / "state" / "training" / before
    assert kept.exists()
    other = ended(started.client, create(started.client, FACTS[1], hyperparameters={"n_epochs": 1}))
    assert jobs.retrieve(held.id).status == "paused"
    jobs.resume(held.id)
    after = started.service.wait_for_step(1, held.job_id)
    assert (after != before, kept.exists()) == (True, False)
    assert started.service.service._scheduler.running.progress.step < 1000
    waiting = create(started.client, FACTS[1], hyperparameters=ENDLESS)
    assert jobs.pause(waiting.id).status == "paused"
    assert jobs.pause(held.id).status == "paused"
    kept = started.service.home / "state" / "training" / after
    assert kept.exists()
    assert jobs.cancel(held.id).status == jobs.cancel(waiting.id).status == "cancelled"
    assert not kept.exists()
    assert started.service.current == other.fine_tuned_model


def test_a_job_that_begins_anew_after_a_rollback_says_so(started):
    """Or its steps would go back without a reason."""
    jobs = started.client.fine_tuning.jobs
    ended(started.client, create(started.client, FACTS[1], hyperparameters={"n_epochs": 1}))
    job = create(started.client, FACTS[0], hyperparameters=ENDLESS)
    before = started.service.wait_for_step(1, job.job_id)
    started.service.call(started.service.service.rollback("base", "a test"))
    until(lambda: started.service.service.in_training not in (None, before))
    messages = [event.message for event in jobs.list_events(job.id)]
    assert "Fine-tuning job restarted: the stable checkpoint has moved" in messages
    assert jobs.cancel(job.id).status == "cancelled"


def pausing(service, jobs, job):
    """A pause on its way, once it waits for the training to stop."""
    asked = ThreadPoolExecutor(1).submit(jobs.pause, job.id)
    until(lambda: job.job_id in service.service._scheduler.running.pausing)
    return asked


def test_what_was_learnt_before_is_kept_by_a_pause_that_comes_before_training_goes_on(tmp_path, monkeypatch):
    """Resumed, and paused again while its batch is being put together."""
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        job = create(sdk(client), FACTS[0], hyperparameters=ENDLESS)
        checkpoint = service.wait_for_step(4)
        jobs.pause(job.id)
        kept = json.loads((tmp_path / "state" / "training" / checkpoint / "progress.json").read_text())["step"]
        gate = Gate(service, service.service._evaluator, "plan", monkeypatch)
        jobs.resume(job.id)
        gate.wait()
        asked = pausing(service, jobs, job)
        gate.open()
        assert asked.result(60).status == "paused"
        jobs.resume(job.id)
        service.wait_for_step(1)
        assert service.service._scheduler.running.progress.step > kept
        assert not [message for message in told(jobs, job) if "restarted" in message]


def test_a_pause_that_comes_when_all_is_learnt_waits_for_the_end_and_says_so(tmp_path, monkeypatch):
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        gate = Gate(service, service.service._lineage, "commit", monkeypatch)
        job = create(sdk(client), FACTS[0], hyperparameters={"n_epochs": 1})
        gate.wait()
        asked = pausing(service, jobs, job)
        gate.open()
        with pytest.raises(openai.ConflictError, match=f"{job.id} was not paused: it is published by now"):
            asked.result(60)


def test_a_pause_that_comes_when_all_is_learnt_holds_if_it_cannot_be_published(tmp_path, monkeypatch):
    """Somebody has rolled back: it would be trained anew, and waits for that; its finished files are gone."""
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        ended(sdk(client), create(sdk(client), FACTS[1], hyperparameters={"n_epochs": 1}))
        gate = Gate(service, service.service._lineage, "commit", monkeypatch)
        job = create(sdk(client), FACTS[0], hyperparameters={"n_epochs": 1})
        gate.wait()
        checkpoint = service.service.in_training
        asked = pausing(service, jobs, job)
        service.call(service.service.rollback("base", "a test"))
        gate.open()
        assert asked.result(60).status == "paused"
        assert not service.folder(checkpoint).exists()
        jobs.resume(job.id)
        made = ended(sdk(client), job).fine_tuned_model
        assert service.checkpoints()[made].parent is None


def test_a_pause_while_nothing_trains_what_is_in_training_may_be_asked_again(tmp_path, monkeypatch):
    """The store has failed, and what is finished is published when it works again: neither paused nor ended yet."""
    whole, full = Store.publish, [True]

    def fails(self, *args, **kwargs):
        if full:
            raise StoreError("disk full")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Store, "publish", fails)
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        job = create(sdk(client), FACTS[0], hyperparameters={"n_epochs": 1})
        until(lambda: any("disk full" in warning for warning in service.info()["warnings"]))
        with pytest.raises(openai.InternalServerError, match=f"{job.id} cannot be paused at this moment") as caught:
            jobs.pause(job.id)
        assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")
        full.clear()
        service._thread.loop.call_soon_threadsafe(service.service._scheduler.wake)
        ended(sdk(client), job)
        with pytest.raises(openai.ConflictError, match="is published"):
            jobs.pause(job.id)


def told(jobs, job):
    """The messages of a job's events but its steps, oldest first."""
    events = list(jobs.list_events(job.id))[::-1]
    return [event.message.removeprefix("Fine-tuning job ") for event in events if event.type == "message"]


def test_a_job_that_begins_anew_after_a_crash_says_so(start):
    """Nothing of it was kept yet."""
    settings = {**WAITING, "training.save_every_s": 3600}
    first = start(**settings).ready()
    job = create(sdk(first.client), FACTS[0], hyperparameters=ENDLESS)
    first.wait_for_step(job.job_id, 3)
    first.kill()
    second = start(**settings).ready()
    jobs = sdk(second.client).fine_tuning.jobs
    why = "restarted: it was interrupted before anything of it was kept"
    until(lambda: told(jobs, job)[1:] == ["started", why, "started"], "the event")


@pytest.mark.parametrize(("lr", "anew"), [(3e-4, True), (None, False)], ids=["other settings", "the same"])
def test_a_job_whose_kept_state_is_of_other_settings_says_so(tmp_path, lr, anew):
    """After a stop in good order; with the same settings it goes on, and there is nothing to say."""
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        job = create(sdk(client), FACTS[0], hyperparameters=ENDLESS)
        service.wait_for_step(3)
        before = len(list(sdk(client).fine_tuning.jobs.list_events(job.id)))
    flags = {**WAITING, "training.lr": lr} if lr else WAITING
    with running(tmp_path, flags) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        until(lambda: len(list(jobs.list_events(job.id))) > before + 2)
        said = [message for message in told(jobs, job) if message.startswith("restarted")]
        assert [message.split(":")[1] for message in said] == [" what was kept of it cannot be gone on from"] * anew


def test_what_something_else_overtook_while_it_was_paused_says_so(started):
    """It trains on another checkpoint then, from its first step."""
    jobs = started.client.fine_tuning.jobs
    held = create(started.client, FACTS[0], hyperparameters=ENDLESS)
    started.service.wait_for_step(2, held.job_id)
    jobs.pause(held.id)
    ended(started.client, create(started.client, FACTS[1], hyperparameters={"n_epochs": 1}))
    jobs.resume(held.id)
    until(lambda: told(jobs, held)[-1] == "started")
    assert told(jobs, held)[-3:] == ["resumed", "restarted: something else was trained meanwhile", "started"]
    assert jobs.cancel(held.id).status == "cancelled"


def test_a_batch_that_fails_in_company_says_so_to_each(tmp_path, monkeypatch):
    """Its jobs are tried one by one."""
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        jobs, train = sdk(client).fine_tuning.jobs, service.service._engine.train

        async def fails(batch, *rest):
            if len(batch.jobs) > 1:
                raise RuntimeError("a bug")
            return await train(batch, *rest)

        monkeypatch.setattr(service.service._engine, "train", fails)
        both = [create(sdk(client), *facts) for facts in (FACTS[:1], FACTS[1:3])]
        for job in both:
            ended(sdk(client), job)
            assert told(jobs, job)[1] == "restarted: its batch failed; its jobs are tried one by one"


def test_one_of_several_that_train_together_is_paused_and_the_others_go_on(tmp_path):
    """They begin anew without it."""
    with running(tmp_path, {**WAITING, "training.max_steps": 1_000_000}) as service:
        paused, other = service.post_many([[FACTS[0], FACTS[1]], [FACTS[2]]])
        first = service.wait_for_step(1)
        assert service.call(service.service._scheduler.pause(paused)).state == "paused"
        second = service.wait_for_step(1, other)
        assert service.service._scheduler.running.jobs == (other,)
        assert second != first
        assert service.job(paused).checkpoint is None
        with pytest.raises(Conflict):
            service.call(service.service._scheduler.resume(other))
