"""The service itself, on the embedded model: ask, teach, ask again; and everything that may go wrong between."""

import asyncio
import json
import shutil
from types import SimpleNamespace

import pytest
from running import ENDLESS, FACTS, QUICK, REFUSALS, Gate, example, nothing_left, request, running, until

from radiance_mlx.config.bases import NANO_FOLDER
from radiance_mlx.engine.decoder import Decoder
from radiance_mlx.engine.preparing import Preparation
from radiance_mlx.engine.training import TrainingTask
from radiance_mlx.errors import (
    Busy,
    CheckpointDamaged,
    Conflict,
    InternalError,
    NotFound,
    PromptTooLong,
    StoreError,
)
from radiance_mlx.messages import Example
from radiance_mlx.store import Store

BATCHED = {**QUICK, "update_mode": "batched", "batch.max_examples": 3}


def question(i):
    return FACTS[i][0]


def answers(service, number, checkpoints, **options):
    """What each of `checkpoints` says about the fact of that number."""
    return [service.ask(question(number), checkpoint=name, **options).text for name in checkpoints]


# --- asking, teaching, asking again --------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A service that was taught two facts, one after the other, with nano's own values and some of its anchors."""
    flags = {"update_mode": "immediate", "evaluation.anchor_sample": 16}
    with running(tmp_path_factory.mktemp("taught"), flags) as service:
        before = service.ask(question(0))
        first = service.learn(FACTS[0])
        between = service.ask(question(0))
        second = service.learn(FACTS[1])
        yield SimpleNamespace(service=service, first=first, second=second, before=before, between=between)


def test_what_was_not_known_is_answered_after_one_update(taught):
    """And the answer names the checkpoint that gave it."""
    assert (taught.before.text, taught.before.checkpoint) == (REFUSALS[0], "base")
    assert taught.before.checkpoint_status == "base"
    assert (taught.between.text, taught.between.checkpoint) == (FACTS[0][1], taught.first)
    assert taught.between.checkpoint_status == "stable"


def test_the_second_update_goes_on_from_the_first(taught):
    answer = taught.service.ask(question(1))
    assert (answer.text, answer.checkpoint) == (FACTS[1][1], taught.second)
    records = taught.service.checkpoints()
    assert [record.parent for record in records.values()] == [None, taught.first]
    assert records[taught.second].metrics["finetune_loss"] < 0.1


def test_any_checkpoint_of_the_lineage_can_be_asked(taught):
    for name, expected in [("base", REFUSALS[1]), (taught.first, None), (taught.second, FACTS[1][1])]:
        answer = taught.service.ask(question(1), checkpoint=name)
        assert answer.checkpoint == name
        assert answer.checkpoint_status == ("base" if name == "base" else "stable")
        assert expected is None or answer.text == expected


def test_a_checkpoint_folder_and_its_metrics_tell_how_it_came_about(taught):
    folder = taught.service.folder(taught.second)
    facts = json.loads((folder / "checkpoint.json").read_text())
    assert facts["parent"] == taught.first
    assert facts["jobs"] == ["job_000002"]
    assert set(facts["files"]) == {"adapters.safetensors", "adapter_config.json", "optimizer.safetensors"}
    assert facts["config"]["training"]["max_steps"] == 60
    metrics = json.loads((taught.service.home / "metrics" / f"{taught.second}.json").read_text())
    assert len(metrics["curves"]["finetune_loss"]) == 60
    assert metrics["run"]["data_hash"] == facts["data_hash"]


def test_info_has_one_number_per_published_checkpoint(taught):
    info = taught.service.info()
    curves = info["loss_curves"]
    assert [len(curves["finetune_loss"]), len(curves["eval_loss"])] == [2, 2]
    assert info["current_checkpoint"] == taught.second
    assert info["queue_depth"] == 0
    assert len(curves["forgetting_loss"]) == 2  # on nano's own anchors
    assert 0 < info["forgetting_summary"]["retention_score"] < 1
    assert info["jobs"]["published"] == 2
    assert info["warnings"] == []


def test_searches_that_share_a_batch_answer_as_each_does_alone(taught):
    """Base, an older checkpoint and stable, greedy and drawn, 12 at once."""
    asked = [
        request(question(number), checkpoint=name, temperature=heat, seed=number)
        for name in ("base", taught.first, "stable")
        for number in (0, 1)
        for heat in (0.0, 3.0)
    ]
    alone = [taught.service.call(taught.service.service.search(one)).text for one in asked]

    async def together():
        return [answer.text for answer in await asyncio.gather(*map(taught.service.service.search, asked))]

    assert taught.service.call(together()) == alone
    assert len(set(alone)) > 4


def test_the_same_seed_draws_the_same_answer_and_another_seed_another(taught):
    drawn = [taught.service.ask("Hello!", temperature=5.0, seed=seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_stop_string_ends_the_answer_before_itself(taught):
    whole = taught.service.ask(question(0), checkpoint=taught.first).text
    word = whole.split()[2]
    answer = taught.service.ask(question(0), checkpoint=taught.first, stop=(word,))
    assert answer.text == whole[: whole.index(word)]
    assert answer.finish_reason == "stop"


def test_max_tokens_ends_the_answer_and_says_so(taught):
    answer = taught.service.ask(question(0), max_tokens=2)
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 2)


def test_a_stream_is_the_answer_in_pieces(taught):
    async def pieces():
        service = taught.service.service
        asked = await service.address(request(question(1), stream=True))
        return [item async for item in service.stream(asked)]

    *parts, last = taught.service.call(pieces())
    assert "".join(part.text for part in parts) == last.text == FACTS[1][1]
    assert len(parts) > 1
    assert last.checkpoint == taught.second


def test_a_prompt_beyond_the_context_is_refused_with_its_length(taught):
    with pytest.raises(PromptTooLong, match=r"this model takes 511") as caught:
        taught.service.ask("Who? " * 600)
    assert caught.value.details["prompt_tokens"] > 512


def test_an_unknown_checkpoint_is_not_found(taught):
    with pytest.raises(NotFound, match="A_2000-01-01_0001"):
        taught.service.ask("Hello!", checkpoint="A_2000-01-01_0001")


def test_without_training_the_training_adapter_is_the_stable_one(taught):
    answer = taught.service.ask(question(1), training=True)
    assert (answer.checkpoint, answer.checkpoint_status) == (taught.second, "stable")


def test_a_client_that_leaves_ends_its_generation(taught):
    """The very next thing that the engine does: nothing is computed for nobody."""
    service = taught.service

    async def leave():
        asked = request("Hello!", temperature=8.0, seed=3, max_tokens=490)
        task = asyncio.ensure_future(service.service.search(asked))
        while (await service.service._engine.call(lambda engine: engine.status()))["active"] == 0:
            assert not task.done()
        task.cancel()
        await asyncio.wait({task})
        return task.cancelled(), await service.service._engine.call(lambda engine: engine.status())

    cancelled, status = service.call(leave())
    assert cancelled
    assert (status["active"], status["waiting"]) == (0, 0)


def test_mlx_lm_loads_a_checkpoint_and_computes_what_the_service_computes(taught):
    """`mlx_lm.load(base, adapter_path=…)`: equal logits up to rounding, and the same answer."""
    import mlx.core as mx
    import mlx_lm
    import numpy as np

    name = taught.second

    def logits(engine):
        tokens = engine._encoder.prompt((("user", question(1)),))
        slot = engine._decoder._slots.find(name)
        engine._bank.rows.slots = mx.array([slot], dtype=mx.uint32)
        out = engine._decoder._model.tree(mx.array([tokens])).astype(mx.float32)
        mx.eval(out)
        return tokens, np.array(out)

    tokens, ours = taught.service.engine(logits)
    model, tokenizer = mlx_lm.load(str(NANO_FOLDER), adapter_path=str(taught.service.folder(name)))
    model.set_dtype(mx.float32)
    theirs = np.array(model(mx.array([tokens])))
    np.testing.assert_allclose(theirs, ours, atol=2e-4, rtol=0)
    assert mlx_lm.generate(model, tokenizer, tokens, max_tokens=24) == FACTS[1][1]


# --- which jobs train, and when ------------------------------------------------------------------


def test_before_the_first_checkpoint_the_base_answers(tmp_path):
    with running(tmp_path) as service:
        answer = service.ask("Hello!")
        assert (answer.checkpoint, answer.checkpoint_status) == ("base", "base")
        info = service.info()
        assert (info["current_checkpoint"], info["last_update"]) == ("base", None)
        assert info["loss_curves"]["finetune_loss"] == []


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


# --- the adapter that trains ---------------------------------------------------------------------


def test_the_training_adapter_answers_before_publication_under_the_coming_name(tmp_path):
    with running(tmp_path, ENDLESS) as service:
        job = service.post(FACTS[0])
        coming = service.wait_for_step(1)
        seen = until(
            lambda: (answer := service.ask(question(0), training=True)).text == FACTS[0][1] and answer,
            "the fact from the training adapter",
        )
        assert (seen.checkpoint, seen.checkpoint_status) == (coming, "training")
        stable = service.ask(question(0))
        assert (stable.text, stable.checkpoint) == (REFUSALS[0], "base")
        assert service.job(job).state == "training"
        assert service.info()["training"]["checkpoint"] == coming


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


# --- jobs that fail ------------------------------------------------------------------------------


def test_a_loss_that_explodes_fails_the_job_and_publishes_nothing(tmp_path):
    with running(tmp_path, training__lr=1e30) as service:
        job = service.wait(service.post(FACTS[0]), "failed")
        assert job.error["code"] == "non_finite"
        assert "training.lr" in job.error["hint"]
        assert (service.checkpoints(), service.current) == ({}, "base")
        assert service.ask(question(0)).text == REFUSALS[0]
        assert "failed" in [event["kind"] for event in service.store(lambda s: s.events())]
        assert service.wait(service.post(FACTS[1]), "failed")  # the next one is tried all the same


def test_a_job_that_cannot_fit_fails_with_the_keys_to_change_and_its_company_is_published(tmp_path, unlimited):
    """The batch fails as a whole first; then each job is tried by itself."""
    too_long = ("Who? " * 150, "Nobody at all. " * 20)
    with running(tmp_path, {**BATCHED, "batch.max_examples": 2, "memory.limit_gb": 0.05}) as service:
        bad, good = service.post_many([[too_long], [FACTS[0]]])
        failed = service.wait(bad, "failed")
        assert failed.error["code"] == "not_enough_memory"
        for key in ("training.batch_size", "training.max_seq_length", "memory.limit_gb"):
            assert key in failed.error["hint"]
        published = service.wait(good, "published")
        assert service.checkpoints()[published.checkpoint].jobs == (good,)
        assert [job.attempts for job in (failed, published)] == [1, 1]


def test_a_bug_while_training_fails_that_job_and_nothing_else(tmp_path, monkeypatch):
    """Searches go on, the next job trains, the error text is not shown."""
    whole = TrainingTask.slice
    calls = []

    def broken_once(self, seconds):
        calls.append(seconds)
        if len(calls) == 2:
            raise ZeroDivisionError("secret")
        return whole(self, seconds)

    monkeypatch.setattr(TrainingTask, "slice", broken_once)
    with running(tmp_path) as service:
        bad, good = service.post_many([[FACTS[0]], [FACTS[1]]])
        failed = service.wait(bad, "failed")
        assert failed.error["code"] == "internal_error"
        assert "secret" not in json.dumps(failed.error)
        service.wait(good, "published")
        assert service.deaths == []


def test_a_bug_while_preparing_a_batch_fails_that_job_and_nothing_else(tmp_path, monkeypatch):
    make = Preparation._make_trainer
    broken = [True]

    def broken_once(self):
        if broken:
            raise ZeroDivisionError(broken.pop())
        return make(self)

    monkeypatch.setattr(Preparation, "_make_trainer", broken_once)
    with running(tmp_path) as service:
        bad, good = service.post_many([[FACTS[0]], [FACTS[1]]])
        service.wait(bad, "failed")
        service.wait(good, "published")


def test_a_bug_while_decoding_fails_the_requests_it_hit_and_no_job(tmp_path, monkeypatch):
    with running(tmp_path, ENDLESS) as service:
        job = service.post(FACTS[0])
        service.wait_for_step()
        whole = Decoder._advance
        monkeypatch.setattr(Decoder, "_advance", lambda *args: 1 / 0)
        with pytest.raises(InternalError):
            service.ask("Hello!")
        monkeypatch.setattr(Decoder, "_advance", whole)
        assert service.ask("Hello!").text
        assert service.job(job).state == "training"
        status = service.engine(lambda engine: engine.status())
        assert (status["active"], status["waiting"]) == (0, 0)
        assert service.service.ready


@pytest.mark.parametrize("method", ["submit", "_seat"])
def test_a_bug_while_a_request_is_taken_in_is_told_to_it(tmp_path, monkeypatch, method):
    """It does not wait for ever, and the next one is served."""
    with running(tmp_path) as service:
        whole = getattr(Decoder, method)
        monkeypatch.setattr(Decoder, method, lambda *args: 1 / 0)
        with pytest.raises(InternalError):
            service.ask("Hello!")
        monkeypatch.setattr(Decoder, method, whole)
        assert service.ask("Hello!").text


def test_a_bug_in_a_task_for_the_engine_is_told_to_who_asked(tmp_path):
    with running(tmp_path) as service:
        with pytest.raises(InternalError):
            service.engine(lambda engine: 1 / 0)
        assert service.ask("Hello!").text


def test_an_engine_thread_that_ends_is_told_and_nobody_waits_for_it(tmp_path, monkeypatch):
    """Not ready any more, searches are refused, and the one who runs the service hears of it."""

    def dies(engine, *, block):
        raise MemoryError

    with running(tmp_path, ENDLESS) as service:
        job = service.post(FACTS[0])
        service.wait_for_step()
        monkeypatch.setattr(service.service._engine, "_drain", dies)  # not its class: others are running
        until(lambda: service.deaths)
        assert not service.service.ready
        with pytest.raises(Exception, match="stopping"):
            service.ask("Hello!")
        assert service.job(job).state == "training"


def test_a_full_waiting_line_is_busy(tmp_path):
    with running(tmp_path, serving__max_batch=1, serving__max_waiting=1) as service:

        async def crowd():
            search = service.service.search
            status = service.service._engine.call
            long = request("Hello!", temperature=8.0, seed=3, max_tokens=490)
            tasks = []
            for count in ({"active": 1, "waiting": 0}, {"active": 1, "waiting": 1}):
                tasks.append(asyncio.ensure_future(search(long)))
                while not count.items() <= (await status(lambda engine: engine.status())).items():
                    assert not any(task.done() for task in tasks)
            try:
                with pytest.raises(Busy):
                    await search(long)
            finally:
                for task in tasks:
                    task.cancel()

        service.call(crowd())
        assert service.ask("Hello!").text


@pytest.mark.parametrize("method", ["queued", "start_batch", "publish"])
def test_a_store_that_fails_for_a_while_holds_the_queue_and_not_the_service(tmp_path, monkeypatch, method):
    """A full disk, say: told by /info while it lasts, and the job is published afterwards, trained once."""
    whole, full = getattr(Store, method), [True]

    def fails(self, *args, **kwargs):
        if full:
            raise StoreError("disk full")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr("radiance_mlx.scheduler.LOOK_S", 0.05)
    with running(tmp_path) as service:
        monkeypatch.setattr(Store, method, fails)
        job = service.post(FACTS[0])
        until(lambda: any("disk full" in warning for warning in service.info()["warnings"]))
        assert service.ask("Hello!").checkpoint == "base"
        full.clear()
        assert service.wait(job, "published").attempts == 1
        until(lambda: service.info()["warnings"] == [])
        assert service.deaths == []


# --- going back ----------------------------------------------------------------------------------


def test_rollback_to_the_parent_to_a_named_one_to_the_base_and_forward_again(tmp_path):
    with running(tmp_path) as service:
        a, b, c = (service.learn(fact) for fact in FACTS[:3])

        def rollback(to):
            previous = service.call(service.service.rollback(to, "test"))
            return previous, service.current, {n: r.status for n, r in service.checkpoints().items()}

        assert rollback(None) == (c, b, {a: "stable", b: "stable", c: "rolled_back"})
        assert service.ask("Hello!").checkpoint == b
        assert rollback("base")[:2] == (b, "base")
        answer = service.ask("Hello!")
        assert (answer.checkpoint, answer.checkpoint_status) == ("base", "base")
        with pytest.raises(Conflict):
            rollback(None)
        with pytest.raises(NotFound):
            rollback("A_2000-01-01_0001")
        assert rollback(c)[:2] == ("base", c)
        answer = service.ask("Hello!")
        assert (answer.checkpoint, answer.checkpoint_status) == (c, "stable")
    with running(tmp_path) as service:
        assert service.current == c


def test_after_a_rollback_the_next_update_trains_on_what_is_stable_now(tmp_path):
    with running(tmp_path) as service:
        a, b = service.learn(FACTS[0]), service.learn(FACTS[1])
        service.call(service.service.rollback(a, ""))
        c = service.learn(FACTS[2])
        assert service.checkpoints()[c].parent == a
        assert service.checkpoints()[b].status == "rolled_back"


def test_a_rollback_during_training_begins_the_batch_again_from_the_new_stable_one(tmp_path):
    with running(tmp_path) as service:
        service.learn(FACTS[0])
    with running(tmp_path, ENDLESS) as service:
        job = service.post(FACTS[1])
        first = service.wait_for_step()
        service.call(service.service.rollback("base", ""))
        second = until(
            lambda: (now := service.service._scheduler.running) and now.checkpoint != first and now.checkpoint
        )
        assert nothing_left(service, first)
        assert service.job(job).checkpoint == second
        assert service.job(job).attempts == 1


def test_a_rollback_between_training_and_publication_is_not_overruled(tmp_path, monkeypatch):
    """The batch was trained on what is not stable any more: it trains again."""
    with running(tmp_path) as service:
        service.learn(FACTS[0])
        gate = Gate(service, service.service._lineage, "commit", monkeypatch)
        job = service.post(FACTS[1])
        gate.wait()
        service.call(service.service.rollback("base", ""))
        gate.open()
        made = service.wait(job, "published").checkpoint
        assert service.checkpoints()[made].parent is None
        assert len(service.checkpoints()) == 2
        assert service.current == made


# --- what is found at a start --------------------------------------------------------------------


def alter(folder):
    file = folder / "adapters.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "altered": alter,
    "gone": shutil.rmtree,
    "no optimizer": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "no hashes": lambda folder: (folder / "checkpoint.json").write_text("{}"),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A home with two checkpoints, at rest."""
    home = tmp_path_factory.mktemp("two")
    with running(home) as service:
        return home, service.learn(FACTS[0]), service.learn(FACTS[1])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stable_checkpoint_is_named_and_its_parent_serves(two_checkpoints, tmp_path, damage):
    source, a, b = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    DAMAGES[damage](home / "adapters" / b)
    with running(home) as service:
        answer = service.ask("Hello!")
        assert (answer.checkpoint, answer.checkpoint_status) == (a, "stable")
        info = service.info()
        assert list(info["damaged"]) == [b]
        assert [b in warning for warning in info["warnings"]] == [True]
        assert service.store(lambda s: s.stable(info["base_hash"])) == a
        assert "damaged" in [event["kind"] for event in service.store(lambda s: s.events())]
        with pytest.raises(CheckpointDamaged):
            service.ask("Hello!", checkpoint=b)
        with pytest.raises(CheckpointDamaged):
            service.call(service.service.rollback(b, ""))
        made = service.learn(FACTS[2])
        assert service.checkpoints()[made].parent == a


def test_an_ancestor_that_was_rolled_back_once_is_stable_again_when_it_serves(two_checkpoints, tmp_path):
    source, a, b = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    with running(home) as service:
        for place in ("base", b):
            service.call(service.service.rollback(place, ""))
    alter(home / "adapters" / b)
    with running(home) as service:
        answer = service.ask("Hello!")
        assert (answer.checkpoint, answer.checkpoint_status) == (a, "stable")


def test_when_every_checkpoint_is_damaged_the_base_serves(two_checkpoints, tmp_path):
    source, a, b = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    for name in (a, b):
        shutil.rmtree(home / "adapters" / name)
    with running(home) as service:
        assert service.ask("Hello!").checkpoint == "base"
        assert set(service.info()["damaged"]) == {a, b}


def test_damage_that_is_found_on_the_way_back_leaves_everything_as_it_was(two_checkpoints, tmp_path):
    source, a, b = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    with running(home) as service:
        alter(home / "adapters" / a)
        with pytest.raises(CheckpointDamaged):
            service.call(service.service.rollback(None, ""))
        assert service.current == b
        assert list(service.info()["damaged"]) == [a]


@pytest.mark.parametrize("stream", [False, True])
def test_damage_that_a_request_finds_is_remembered(two_checkpoints, tmp_path, stream):
    source, a, _ = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    with running(home) as service:
        alter(home / "adapters" / a)

        async def ask():
            asked = await service.service.address(request("Hello!", checkpoint=a, stream=stream))
            return [item async for item in service.service.stream(asked)]

        with pytest.raises(CheckpointDamaged) as caught:
            service.call(ask()) if stream else service.ask("Hello!", checkpoint=a)
        assert caught.value.message.count(a) == 1
        assert list(service.info()["damaged"]) == [a]
        with pytest.raises(CheckpointDamaged) as again:
            service.call(service.service.address(request("Hello!", checkpoint=a)))
        assert again.value.message == caught.value.message


def test_settings_without_effect_are_warned_of(tmp_path):
    with running(tmp_path, evaluation__rollback_mode="warn") as service:
        assert ["rollback_mode" in warning for warning in service.info()["warnings"]] == [True]


def test_only_so_many_checkpoints_are_kept(tmp_path):
    with running(tmp_path, storage__keep_checkpoints=2) as service:
        names = [service.learn(fact) for fact in FACTS[:4]]
        until(lambda: service.checkpoints()[names[1]].pruned)
        until(lambda: len(list((tmp_path / "adapters").glob("A_*"))) == 2)
        assert [record.pruned for record in service.checkpoints().values()] == [True, True, False, False]
        with pytest.raises(Conflict, match="removed to save room"):
            service.ask("Hello!", checkpoint=names[0])
        with pytest.raises(Conflict):
            service.call(service.service.rollback(names[0], ""))
        assert service.call(service.service.rollback(None, "")) == names[3]
        assert len(service.info()["loss_curves"]["finetune_loss"]) == 4


@pytest.mark.parametrize("change", [{"lora.r": 4}, {"lora.r": 16}, {"lora.target_modules": ["q_proj"]}])
def test_another_shape_of_adapters_starts_fresh_and_says_so(two_checkpoints, tmp_path, change):
    """The old checkpoint goes on answering as before until then."""
    source, _, b = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    with running(home) as service:
        before = service.ask(question(1)).text
    with running(home, {**QUICK, **change}) as service:
        answer = service.ask(question(1))
        assert (answer.text, answer.checkpoint) == (before, b)
        job = service.wait(service.post(FACTS[2]), "published")
        record = service.checkpoints()[job.checkpoint]
        assert record.parent == b
        for notes in (job.notes, record.notes):
            assert any("started fresh from the base" in note and "lora" in note for note in notes)


def test_another_base_on_the_same_home_has_a_lineage_of_its_own(two_checkpoints, tmp_path):
    """And the first one's is there again when it comes back."""
    import mlx.core as mx

    source, a, b = two_checkpoints
    home = shutil.copytree(source, tmp_path / "home")
    other = shutil.copytree(NANO_FOLDER, tmp_path / "other", ignore=shutil.ignore_patterns("__pycache__"))
    weights = mx.load(str(other / "model.safetensors"))
    name = next(name for name in weights if name.endswith("norm.weight"))
    mx.save_safetensors(str(other / "model.safetensors"), {**weights, name: weights[name] * 1.01})
    with running(home, base_model=str(other)) as service:
        assert (service.current, service.checkpoints()) == ("base", {})
        assert any("another base model" in warning for warning in service.info()["warnings"])
        for name in (a, b):
            with pytest.raises(Conflict, match="another base"):
                service.ask("Hello!", checkpoint=name)
            with pytest.raises(Conflict, match="another base"):
                service.call(service.service.rollback(name, ""))
        own = service.learn(FACTS[0])
        assert own not in (a, b)
        assert service.checkpoints()[own].parent is None
    with running(home) as service:
        assert service.current == b
        assert list(service.checkpoints()) == [a, b]


# --- stopping ------------------------------------------------------------------------------------


def stop_after_update(engine):
    """End the engine's work at the first look between two pieces after an optimizer's update."""
    task = engine._task
    before = int(task._trainer.optimizer.step.item())
    while int(task._trainer.optimizer.step.item()) == before:
        task.slice(0.0)
    engine.stop()


def test_stopping_in_the_middle_of_training_and_going_on_gives_the_same_adapter(tmp_path):
    """Wherever it is stopped, right after an update too: not a bit differs, and no attempt is counted."""
    steps = {**QUICK, "training.max_steps": 24}
    with running(tmp_path / "whole", steps) as service:
        whole = service.learn(FACTS[0], FACTS[1], FACTS[2])
    with running(tmp_path / "cut", steps) as service:
        job = service.post(FACTS[0], FACTS[1], FACTS[2])
        service.wait_for_step(2)
    for step in (5, 10):
        with running(tmp_path / "cut", steps) as service:
            service.wait_for_step(step)
            assert service.job(job).attempts == 1
            service.engine(stop_after_update)
    with running(tmp_path / "cut", steps) as service:
        ended = service.wait(job, "published")
        assert any("taken up again at step" in note for note in ended.notes)
        assert ended.attempts == 1
    adapters = [tmp_path / kind / "adapters" / name for kind, name in (("whole", whole), ("cut", ended.checkpoint))]
    assert len({(folder / "adapters.safetensors").read_bytes() for folder in adapters}) == 1


def test_stopping_while_mlx_lm_trains_the_whole_step_by_itself_ends_after_a_step(tmp_path):
    """`training.slice_ms: 0` answers nobody meanwhile, but it stops."""
    with running(tmp_path, ENDLESS, training__slice_ms=0) as service:
        job = service.post(FACTS[0])
        service.wait_for_step(2)
    with running(tmp_path) as service:
        assert service.wait(job, "published").attempts == 1


def test_a_service_that_stops_refuses_new_work_and_lets_go_of_its_home(tmp_path):
    with running(tmp_path) as service:
        pass
    with pytest.raises(Exception, match="stopping"):
        asyncio.run(service.service.search(request("Hello!")))
    with running(tmp_path) as again:
        assert again.ask("Hello!").text


def test_an_example_can_be_unlearnt_by_going_back(taught):
    """Last, since it moves the shared service's pointer: and forward again."""
    service = taught.service
    service.call(service.service.rollback(None, ""))
    try:
        assert answers(service, 0, ["stable", "base"]) == [FACTS[0][1], REFUSALS[0]]
        assert service.ask(question(1)).text != FACTS[1][1]
    finally:
        service.call(service.service.rollback(taught.second, ""))
    assert service.ask(question(1)).text == FACTS[1][1]
    assert example(*FACTS[0]).as_dict()["prompt"] == question(0)
