"""The service's queue: which jobs train, when, together with which; and jobs that are not wanted any more."""

import shutil

import pytest
from running import BATCHED, ENDLESS, FACTS, QUICK, Gate, nothing_left, running, until

from radiance_mlx.errors import Conflict, NotFound
from radiance_mlx.messages import Example
from radiance_mlx.store import Store

# --- which jobs train, and when ------------------------------------------------------------------


def test_immediate_trains_each_update_by_itself_in_order(tmp_path):
    with running(tmp_path) as service:
        jobs = service.post_many([[FACTS[0]], [FACTS[1]], [FACTS[2]]])
        made = [service.wait(job, "published").checkpoint for job in jobs]
        records = service.checkpoints()
        assert list(records) == made
        assert [record.parent for record in records.values()] == [None, *made[:2]]
        assert [record.jobs for record in records.values()] == [(job,) for job in jobs]


def test_batched_waits_for_enough_examples_and_trains_them_into_one_checkpoint(tmp_path):
    with running(tmp_path, BATCHED) as service:
        waiting = service.post_many([[FACTS[0]], [FACTS[1]]])
        until(lambda: service.service._scheduler._wake.is_set() is False, "the scheduler has looked")
        assert [service.job(job).state for job in waiting] == ["queued", "queued"]
        assert service.info()["queue_depth"] == 2
        last = service.wait(service.post(FACTS[2]), "published")
        assert {service.wait(job, "published").checkpoint for job in waiting} == {last.checkpoint}
        (record,) = service.checkpoints().values()
        assert record.jobs == (*waiting, last.job_id)
        assert record.metrics["examples"] == 3


def test_batched_trains_what_is_old_enough_and_its_age_survives_a_restart(tmp_path):
    now = [1_000_000.0]
    settings = {**BATCHED, "batch.max_age_minutes": 30}
    with running(tmp_path, settings, clock=lambda: now[0]) as service:
        job = service.post(FACTS[0])
        assert service.job(job).state == "queued"
    now[0] += 29 * 60
    with running(tmp_path, settings, clock=lambda: now[0]) as service:
        scheduler = service.service._scheduler
        until(lambda: not scheduler._wake.is_set())
        assert service.job(job).state == "queued"
        now[0] += 61
        service._thread.loop.call_soon_threadsafe(scheduler.wake)
        assert service.wait(job, "published").attempts == 1


def test_continue_starts_from_the_parent_and_fresh_from_the_base(tmp_path):
    """The same example twice: a continued lineage begins the second time where it had come to."""
    first_losses = {}
    for mode in ("continue", "fresh"):
        with running(tmp_path / mode, lineage=mode) as service:
            names = [service.learn(FACTS[0]), service.learn(FACTS[0])]
            records = service.checkpoints()
            assert records[names[1]].parent == names[0]
            first_losses[mode] = [records[name].metrics["first_loss"] for name in names]
    assert first_losses["continue"][1] < 0.9 * first_losses["continue"][0]
    assert first_losses["fresh"][1] == pytest.approx(first_losses["fresh"][0], rel=1e-6)


def test_an_example_longer_than_allowed_is_cut_and_noted(tmp_path):
    with running(tmp_path, training__max_seq_length=32) as service:
        job = service.wait(service.post(("Who? " * 100, "Nobody."), FACTS[0]), "published")
        (note,) = [note for note in job.notes if "longer than 32 tokens" in note]
        assert "1 of 2 examples" in note
        assert note in service.checkpoints()[job.checkpoint].notes


def test_every_form_of_example_trains_together(tmp_path):
    chat = Example(messages=(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")))
    with running(tmp_path) as service:
        job = service.wait(service.post(FACTS[0], chat, Example(text="Plain text to go on with.")), "published")
        assert service.checkpoints()[job.checkpoint].metrics["examples"] == 3
        folder = service.home / "data" / "curated" / job.job_id
        assert sorted(file.name for file in folder.iterdir()) == ["text.jsonl", "train.jsonl"]


# --- cancelling ----------------------------------------------------------------------------------


def test_a_job_that_waits_is_cancelled_at_once(tmp_path):
    with running(tmp_path, BATCHED) as service:
        job = service.post(FACTS[0])
        assert service.call(service.service.cancel(job)).state == "cancelled"
        service.wait(service.post(FACTS[1], FACTS[2], FACTS[3]), "published")
        assert next(iter(service.checkpoints().values())).metrics["examples"] == 3
        with pytest.raises(Conflict, match="cancelled"):
            service.call(service.service.cancel(job))
        with pytest.raises(NotFound):
            service.call(service.service.cancel("job_999999"))


def test_a_job_that_trains_is_stopped_and_leaves_nothing(tmp_path):
    with running(tmp_path, ENDLESS, training__save_every_s=0.01) as service:
        job = service.post(FACTS[0])
        checkpoint = service.wait_for_step(3)
        assert service.call(service.service.cancel(job)).state == "training"
        service.wait(job, "cancelled")
        until(lambda: service.service._scheduler.running is None)
        assert nothing_left(service, checkpoint)
        assert service.checkpoints() == {}
        assert service.ask("Hello!").checkpoint == "base"


def test_cancelling_one_of_a_batch_trains_the_others_at_once(tmp_path):
    """Although they alone would not have been enough examples to begin."""
    with running(tmp_path, {**ENDLESS, "update_mode": "batched", "batch.max_examples": 3}) as service:
        jobs = service.post_many([[FACTS[0]], [FACTS[1]], [FACTS[2]]])
        first = service.wait_for_step()
        service.call(service.service.cancel(jobs[1]))
        service.wait(jobs[1], "cancelled")
        second = until(
            lambda: (now := service.service._scheduler.running) and now.checkpoint != first and now,
            "the batch of the others",
        )
        assert second.jobs == (jobs[0], jobs[2])
        assert [service.job(job).attempts for job in second.jobs] == [1, 1]


def test_a_job_that_is_trained_but_not_published_can_be_cancelled(tmp_path, monkeypatch):
    """Its folder is complete already, and goes again."""
    with running(tmp_path) as service:
        gate = Gate(service, service.service._lineage, "commit", monkeypatch)
        job = service.post(FACTS[0])
        gate.wait()
        checkpoint = service.wait(job, "evaluating").checkpoint
        assert service.folder(checkpoint).is_dir()
        assert service.call(service.service.cancel(job)).state == "evaluating"
        gate.open()
        service.wait(job, "cancelled")
        until(lambda: service.service._scheduler.running is None)
        assert nothing_left(service, checkpoint)
        assert (service.checkpoints(), service.current) == ({}, "base")


def test_a_job_cancelled_while_its_batch_is_being_put_together_does_not_train(tmp_path, monkeypatch):
    with running(tmp_path) as service:
        gate = Gate(service, service.service._scheduler, "_examples", monkeypatch)
        job = service.post(FACTS[0])
        gate.wait()
        assert service.call(service.service.cancel(job)).state == "training"
        gate.open()
        service.wait(job, "cancelled")
        assert service.checkpoints() == {}


def test_what_is_published_cannot_be_cancelled_any_more(tmp_path):
    with running(tmp_path) as service:
        service.learn(FACTS[0])
        with pytest.raises(Conflict, match="published"):
            service.call(service.service.cancel("job_000001"))
        assert service.job("job_000001").state == "published"


def test_a_wish_to_cancel_that_is_found_at_a_start_is_fulfilled_and_its_company_is_published(tmp_path):
    """Also when the batch's folder was finished: nothing of it is kept."""
    with running(tmp_path, {**ENDLESS, "update_mode": "batched", "batch.max_examples": 2}) as service:
        bad, good = service.post_many([[FACTS[0]], [FACTS[1]]])
        first = service.wait_for_step()
    with Store(tmp_path)._database.write() as db:  # as after `kill -9` between the 202 and the stop
        db.execute("UPDATE jobs SET cancel_requested = 1 WHERE job_id = ?", (bad,))
    with running(tmp_path, {**QUICK, "update_mode": "batched", "batch.max_examples": 2}) as service:
        made = service.wait(good, "published").checkpoint
        assert service.job(bad).state == "cancelled"
        assert service.store(lambda s: s.events_of(bad))[-1]["kind"] == "cancelled"
        assert service.checkpoints()[made].jobs == (good,)
        assert made != first
        assert nothing_left(service, first)


def test_a_finished_folder_with_a_job_to_be_cancelled_is_not_published_at_a_start(tmp_path, monkeypatch):
    with running(tmp_path) as service:
        gate = Gate(service, service.service._lineage, "publish", monkeypatch)
        job = service.post(FACTS[0])
        gate.wait()
        checkpoint = service.job(job).checkpoint
        service.call(service.service.cancel(job))
        shutil.copytree(tmp_path, copy := tmp_path.with_name("copy"))  # as after `kill -9`
        gate.open()
        service.wait(job, "cancelled")
    assert (copy / "adapters" / checkpoint).is_dir()
    with running(copy) as service:
        service.wait(job, "cancelled")
        until(lambda: nothing_left(service, checkpoint))
        assert (service.checkpoints(), service.current) == ({}, "base")
