"""What waits until an evaluation has ended, and is not wished for any more."""

import asyncio
import json
import threading

import pytest
from running import ENDLESS, FACTS, running, until

from radiance_mlx.engine.measuring import MeasuringTask

LOCAL = {**ENDLESS, "evaluation.anchor_provider": "local", "evaluation.rollback_mode": "off"}


@pytest.fixture
def service(tmp_path):
    """With an anchor to measure on."""
    anchors = tmp_path / "data" / "anchors"
    anchors.mkdir(parents=True)
    (anchors / "mine.jsonl").write_text(json.dumps({"prompt": FACTS[5][0], "completion": FACTS[5][1]}) + "\n")
    with running(tmp_path, LOCAL) as service:
        yield service


@pytest.fixture
def evaluation(service, monkeypatch):
    """`evaluation()` begins one, which ends when the test calls what it gives; that gives the results."""
    goes_on, inner = threading.Event(), MeasuringTask.slice
    monkeypatch.setattr(MeasuringTask, "slice", lambda task, s: inner(task, s) if goes_on.is_set() else None)

    def begin():
        asked = asyncio.run_coroutine_threadsafe(service.service.evaluate(["base"], None, {}), service._thread.loop)
        until(lambda: isinstance(service.engine(lambda engine: engine._task), MeasuringTask), "measuring")

        def end():
            goes_on.set()
            return asked.result(60)["results"]

        return end

    yield begin
    goes_on.set()


def behind(service, job):
    """Until the job's batch waits for its turn."""
    until(lambda: service.job(job).state == "training", "its turn")
    until(lambda: len(service.service._engine._in_background._waiters or ()) == 1, "waiting")


def test_a_job_is_paused_at_once_and_goes_on_from_what_it_had_learnt(service, evaluation):
    job = service.post(FACTS[0])
    checkpoint = service.wait_for_step(4)
    scheduler = service.service._scheduler
    service.call(scheduler.pause(job))
    kept = json.loads((service.home / "state" / "training" / checkpoint / "progress.json").read_text())["step"]
    end = evaluation()
    service.call(scheduler.resume(job))
    behind(service, job)
    assert service.call(scheduler.pause(job)).state == "paused"
    assert len(end()) == 1
    service.call(scheduler.resume(job))
    service.wait_for_step(1)
    assert scheduler.running.progress.step > kept >= 4


def test_a_job_is_cancelled_at_once_and_the_next_has_its_turn(service, evaluation):
    """What waits behind it does not lose its place, nor the evaluation its end."""
    first = service.post(FACTS[0])
    service.wait_for_step(1)
    service.call(service.service.cancel(first))
    service.wait(first, "cancelled")
    end = evaluation()
    second = service.post(FACTS[1])
    behind(service, second)
    service.call(service.service.cancel(second))
    service.wait(second, "cancelled")
    third = service.post(FACTS[2])
    behind(service, third)
    assert len(end()) == 1
    service.wait_for_step(1, third)
