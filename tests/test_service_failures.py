"""What fails in the service fails for whom it concerns: a job, a request, or all that wait for the engine."""

import asyncio
import json

import pytest
from running import BATCHED, ENDLESS, FACTS, REFUSALS, question, request, running, until

from radiance_mlx.engine.decoder import Decoder
from radiance_mlx.engine.preparing import Preparation
from radiance_mlx.engine.training import TrainingTask
from radiance_mlx.errors import Busy, InternalError, StoreError
from radiance_mlx.store import Store


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
