"""The service as a process: how it stops, what it finds again after a crash, and who may start beside it."""

import json
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from running import ENDLESS, FACTS, QUICK, Process, died_again, running, until

from radiance_mlx.api.responses import job_body

#: saved all the time: to be killed in the middle and gone on with
LONG = {"training.max_steps": 60, "training.batch_size": 1, "training.save_every_s": 0.01}
MAIN = "import sys; from radiance_mlx.__main__ import main; sys.exit(main())"
#: the same program, which ends as by `kill -9` at a given place
DIES_BEFORE_THE_ROW = (
    "import os; from radiance_mlx.lineage import Lineage\n"
    "async def publish(self, *rest): os._exit(9)\n"
    "Lineage.publish = publish\n" + MAIN
)
DIES_AFTER_THE_ROW = (
    "import os; from radiance_mlx.store import Store; whole = Store.publish\n"
    "def publish(self, *rest, **more): whole(self, *rest, **more); os._exit(9)\n"
    "Store.publish = publish\n" + MAIN
)
DIES_OF_THE_FIRST_JOB = (
    "import os; from radiance_mlx.engine.training import TrainingTask as Task; whole = Task.slice\n"
    "def slice(self, seconds):\n"
    "    if 'job_000001' in self.batch.jobs: os._exit(9)\n"
    "    return whole(self, seconds)\n"
    "Task.slice = slice\n" + MAIN
)
#: the loop does not come back from the first signal; and what follows the loop does not end
LOOP_HANGS = "import time; from radiance_mlx.api import server\nserver._end_in_time = lambda: time.sleep(60)\n" + MAIN
END_HANGS = (
    "import time; from radiance_mlx.api import server; whole = server.serve\n"
    "async def ends(*_): return 0\n"
    "def serve(*given): whole(*given); print('over', flush=True); time.sleep(60)\n"
    "server._serve, server.serve = ends, serve\n" + MAIN
)
ENGINE_DIES = "from radiance_mlx.engine.core import Engine\nEngine.step = lambda self: 1 / 0\n" + MAIN


def open_stream(process):
    """A long answer on its way: an event set when its first piece is there, and the thread that reads on."""
    begun = threading.Event()

    def read():
        body = {"prompt": "Hello!", "max_tokens": 490, "temperature": 8, "seed": 3, "stream": True}
        try:
            with process.client.stream("POST", "/search", json=body) as response:
                for line in response.iter_lines():
                    if line:
                        begun.set()
        except Exception:
            begun.set()  # cut off: what is to be seen is that nobody hangs

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(60)
    return thread


def test_one_signal_stops_in_good_order_and_training_goes_on_where_it_was(start):
    """SIGTERM or Ctrl-C: within 10 s and with exit code 0, with a stream open, and no attempt is counted."""
    first = start(**ENDLESS).ready()
    job = first.update(FACTS[0])
    reached = first.wait_for_step(job, 10)["progress"]["step"]
    reader = open_stream(first)
    first.signal(signal.SIGTERM)
    code = first.exit_code(10)
    assert code == 0, first.log[-3000:]
    reader.join(10)
    assert not reader.is_alive()
    assert not (first.home / "state" / "server.json").exists()

    second = start(**ENDLESS).ready()
    again = second.wait_for_step(job)
    assert again["progress"]["step"] > reached
    assert again["attempts"] == 1
    assert second.get("/checkpoints")["checkpoints"] == []
    second.signal(signal.SIGINT)
    assert second.exit_code(10) == 0


def test_who_waits_for_a_long_answer_at_the_stop_is_told(start):
    """An unstreamed search gets the 503 of its kind, a streamed one an error and its end; neither is cut off."""
    process = start(**{**ENDLESS, "training.share": 0.9}).ready()
    process.wait_for_step(process.update(FACTS[0]), 2)
    body = {"prompt": "Hello!", "max_tokens": 490, "temperature": 8, "seed": 3}
    events = []

    def stream():
        with process.client.stream("POST", "/search", json={**body, "stream": True}) as response:
            events.extend(line for line in response.iter_lines() if line.startswith("data:"))

    with ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(stream)
        whole = pool.submit(process.client.post, "/search", json=body)
        until(lambda: process.get("/info")["engine"]["active"] == 2)
        process.signal(signal.SIGTERM)
        answer = whole.result(20)
        streamed.result(20)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert '"not_ready"' in events[-2]
    assert events[-1] == "data: [DONE]"
    assert process.exit_code(10) == 0
    assert "Traceback" not in process.log


def test_a_second_ctrl_c_ends_it_at_once(start):
    """However busy the event loop is then."""
    process = start(script=LOOP_HANGS).ready()
    reader = open_stream(process)  # which would be given some seconds to end
    process.signal(signal.SIGINT)
    until(lambda: "stopping" in process.log)
    process.signal(signal.SIGINT)
    assert process.exit_code(10) == 128 + signal.SIGINT
    reader.join(10)


def test_a_ctrl_c_after_the_event_loop_has_ended_is_no_traceback(start):
    process = start(script=END_HANGS)
    until(lambda: "over" in process.log)
    process.signal(signal.SIGINT)
    assert process.exit_code(10) == 128 + signal.SIGINT
    assert process.log == "over\n"


def test_a_process_killed_right_after_it_accepted_an_update_publishes_it_once_after_the_next_start(start):
    first = start().ready()
    job = first.update(FACTS[0])
    first.kill()
    with running(first.home) as second:
        checkpoint = second.wait(job, "published").checkpoint
        assert list(second.checkpoints()) == [checkpoint] == [second.current]
        assert second.ask("Hello!").checkpoint == checkpoint


def test_a_process_killed_while_it_trains_goes_on_from_the_last_saved_step(start):
    first = start(**LONG).ready()
    job = first.update(FACTS[0])
    first.wait_for_step(job, 3)
    until(lambda: list((first.home / "state" / "training").glob("A_*")))
    first.kill()
    second = start(**LONG).ready()
    done = second.wait(job)
    assert done["attempts"] == 2
    assert any("taken up again at step" in note for note in done["notes"])
    assert len(second.get("/checkpoints")["checkpoints"]) == 1
    until(lambda: not list((second.home / "state" / "training").iterdir()))


@pytest.mark.parametrize("fault", [DIES_BEFORE_THE_ROW, DIES_AFTER_THE_ROW], ids=["before the row", "after the row"])
def test_a_process_that_dies_as_it_publishes_has_published_once_after_the_next_start(start, fault):
    """Between the folder's rename and the row of the checkpoint, and right after it: one checkpoint, not two."""
    first = start(script=fault).ready()
    job = first.update(FACTS[0])
    assert first.exit_code() == 9
    (folder,) = (first.home / "adapters").glob("A_*")
    before = folder.stat().st_mtime_ns
    with running(first.home) as second:
        done = second.wait(job, "published")
        assert (done.checkpoint, done.attempts) == (folder.name, 1)
        (record,) = second.checkpoints().values()
        assert (record.checkpoint, record.parent, record.jobs) == (folder.name, None, (job,))
        assert folder.stat().st_mtime_ns == before  # not trained again
        assert (second.home / "metrics" / f"{folder.name}.json").is_file()
        assert len(list((second.home / "adapters").iterdir())) == 1


def test_a_job_that_was_taken_up_three_times_is_quarantined_and_its_company_is_published(start):
    batched = {"update_mode": "batched", "batch.max_examples": 2}
    first = start(script=DIES_OF_THE_FIRST_JOB, **batched).ready()
    bad, good = first.update(FACTS[0]), first.update(FACTS[1])
    assert first.exit_code() == 9
    died_again(first.home, 2)  # taken up again: together, together,
    assert start(script=DIES_OF_THE_FIRST_JOB, **batched).exit_code() == 9  # and at last alone
    with running(first.home, {**QUICK, **batched, "batch.max_examples": 1}) as last:
        quarantined = last.wait(bad, "quarantined")
        assert "4 times" in quarantined.error["message"]
        over = last.store(lambda s: s.events_of(bad))[-1]
        assert (over["kind"], over["data"]["jobs"]) == ("quarantined", [bad])
        assert over["data"]["error"] == quarantined.error
        assert job_body(quarantined, None)["checkpoint"] is None
        last.wait(good, "published")
        (record,) = last.checkpoints().values()
        assert record.jobs == (good,)
        told = [event["data"] for event in last.store(lambda s: s.events_of(good)) if event["kind"] == "restarted"]
        assert [one["why"] for one in told] == ["the process ended again and again while it trained with others"]


def refusal(process: Process) -> str:
    """What a process that cannot start says; it ends with an exit code of its own, and without a traceback."""
    code = process.exit_code()
    assert code not in (0, -signal.SIGTERM)
    assert "Traceback" not in process.log, process.log
    return process.log


def test_a_second_process_on_the_same_home_is_refused_and_told_who_has_it(start):
    first = start().ready()
    before = first.log
    said = refusal(start())[len(before) :]
    assert "is in use by" in said
    assert str(first.pid) in said
    assert first.get("/readyz") == {"status": "ready"}
    address = json.loads((first.home / "state" / "server.json").read_text())
    assert address["pid"] == first.pid


def test_what_keeps_it_from_starting_is_one_clear_error(start, tmp_path):
    """A port that is taken, a base model that is none: said, and nothing is left behind."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(start(**{"server.port": port}, home=tmp_path / "port"))
        assert f"Cannot listen on 127.0.0.1:{port}" in said
    process = start(base_model=str(tmp_path), home=tmp_path / "model")
    assert "config.json" in refusal(process)
    assert process.exit_code() == 2  # it is the configuration that is wrong
    assert not (tmp_path / "model" / "state" / "server.json").exists()


def test_a_process_whose_engine_has_died_ends_with_an_exit_code(start):
    """Something must start it again: one that lives on and answers nothing would be worse."""
    process = start(script=ENGINE_DIES)
    assert process.exit_code() == 1
    assert "ZeroDivisionError" in process.log


def test_a_cancellation_that_was_accepted_holds_after_kill_9(start):
    """What was answered with 202 is not published by the next process."""
    first = start(**{"training.max_steps": 1_000_000}).ready()
    job = first.update(FACTS[0])
    first.wait_for_step(job)
    assert first.client.delete(f"/jobs/{job}").status_code == 202
    first.kill()
    with running(first.home) as second:
        assert job_body(second.wait(job, "cancelled"), None)["checkpoint"] is None
        assert second.checkpoints() == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_it_with_exit_code_0(tmp_path, number):
    """From the first import on, long before the service handles signals itself; silently."""
    slow = "import sys; from radiance_mlx import __main__ as start; sys.argv = ['x', 'run']\n"
    stuck = "import builtins, time; whole = builtins.__import__\n" + slow
    stuck += "def slowly(name, *rest):\n    print('importing', flush=True); time.sleep(60)\n"
    stuck += "builtins.__import__ = slowly\nsys.exit(start.main())"
    process = subprocess.Popen([sys.executable, "-c", stuck], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_the_imports_and_the_service_ends_it_with_exit_code_0(start, number):
    """Also when the program was started by its installed name, which imports it first."""
    script = (
        "import sys, time; from radiance_mlx.api import server\n"
        "def opens(*_): print('opening', flush=True); time.sleep(60)\n"
        "server.serve = opens\nfrom radiance_mlx.__main__ import main; sys.exit(main())"
    )
    process = start(script=script)
    until(lambda: "opening" in process.log)
    process.signal(number)
    assert process.exit_code(10) == 0
    assert process.log == "opening\n"
