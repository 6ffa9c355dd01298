"""The store through crashes: a kill at any line, at any time, leaves nothing half done."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from stores import BASE, Clock, accept, python, record, train

import radiance_mlx.store as store_package
from radiance_mlx.store import Store

PACKAGE = str(Path(store_package.__file__).parent)


def die_at_line(number: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that ends the process, as a kill would, before the store runs its n-th line."""
    left = number

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os._exit(9)
        return trace

    return trace


def dies(action: Callable[[], object], line: int) -> bool:
    """Run `action` in a process of its own that dies before that line; False when it got to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.settrace(die_at_line(line))
            action()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the action itself failed"
    return code == 9


def run_and_die(home: Path, action: Callable[[Store], object], line: int) -> bool:
    """The same for an action on a store that is open already."""

    def act() -> None:
        trace = sys.gettrace()
        sys.settrace(None)
        store = Store(home, Clock())
        sys.settrace(trace)
        action(store)

    return dies(act, line)


def snapshot(home: Path) -> dict[str, Any]:
    """All that a restart sees, but for events' times."""
    store = Store(home, Clock())
    jobs = store.jobs()
    for job in jobs:
        if job.kind == "reconsolidation":
            continue
        assert (home / "data/raw" / f"{job.job_id}.json").read_bytes() == b"raw"
        assert (home / "data/curated" / job.job_id / "examples.jsonl").read_bytes() == b"curated"
        assert len(store.examples_of([job.job_id])) == job.example_count
    seen = {
        "jobs": [asdict(job) for job in jobs],
        "checkpoints": [asdict(one) for one in store.checkpoints()],
        "stable": store.stable(BASE),
        "events": store.events(),
        "uploads": [(one.filename, store.uploads.content(one.file_id)) for one in store.uploads.all()],
        "bodies": len(list((home / "data/files").iterdir())),
        "values": [tuple(row) for row in store._database._connection.execute("SELECT * FROM meta")],
        "reserved": store._database._connection.execute("SELECT count(*) FROM reservations").fetchone()[0],
    }
    store.close()
    return seen


def publish_second(store: Store) -> None:
    checkpoint, jobs = store.interrupted()[0]
    ids = tuple(job.job_id for job in jobs)
    parent = store.stable(BASE)
    store.publish(record(checkpoint, parent, ids), events=[("published", {})])


ACTIONS: dict[str, Callable[[Store], object]] = {
    "accept": lambda store: accept(store, "a", "b", key="new"),
    "start_batch": lambda store: store.start_batch(["job_000003"], BASE),
    "publish": publish_second,
    "start_reconsolidation": lambda store: store.start_reconsolidation(BASE, store.stable(BASE) or ""),
    "put_aside": lambda store: store.put_aside("job_000002", "why"),
    "requeue": lambda store: store.requeue(["job_000002"], count_attempt=False),
    "hold": lambda store: store.hold("job_000002"),
    "cancel": lambda store: store.cancel("job_000003"),
    "cancel_in_training": lambda store: store.set_state(["job_000002"], "cancelled", events=[("cancelled", {})]),
    "greet_base": lambda store: store.greet_base("another"),
    "upload": lambda store: store.uploads.add("b.jsonl", "fine-tune", b"body", 1),
    "delete_upload": lambda store: store.uploads.delete(store.uploads.all()[0].file_id),
    "move_stable": lambda store: store.move_stable(BASE, None, "why"),
}


@pytest.mark.parametrize("name", sorted(ACTIONS))
def test_a_kill_at_any_line_leaves_the_state_before_or_after(tmp_path: Path, name: str) -> None:
    """Death anywhere inside an action is seen by the restart as the whole action or nothing of it."""
    origin = tmp_path / "origin"
    origin.mkdir()
    store = Store(origin, Clock())
    train(store)
    accept(store)
    store.greet_base(BASE)
    store.uploads.add("a.jsonl", "fine-tune", b"a", 1)
    store.start_batch(["job_000002"], BASE)
    if name != "start_reconsolidation":  # which begins only while nothing waits
        accept(store)
    store.close()
    before = snapshot(origin)
    whole = shutil.copytree(origin, tmp_path / "whole")
    assert not run_and_die(whole, ACTIONS[name], 1_000_000)
    after = snapshot(whole)
    assert after != before
    line, found = 0, []
    while True:
        home = shutil.copytree(origin, tmp_path / f"home{line}")
        died = run_and_die(home, ACTIONS[name], line)
        state = snapshot(home)
        assert state in (before, after), f"half of {name} after {line} lines"
        found.append(state == after)
        shutil.rmtree(home)
        if not died:
            break
        line += 3
    assert found == sorted(found)
    assert found[0] is False
    assert found[-1] is True


def test_a_kill_at_any_line_of_the_first_start_is_no_obstacle(tmp_path: Path) -> None:
    """However far the making of the store came, the next start finishes it."""
    line, died = 0, True
    while died:
        home = tmp_path / f"home{line}"
        died = dies(lambda home=home: Store(home, Clock()), line)  # type: ignore[misc]
        store = Store(home, Clock())
        assert train(store) == "A_2026-02-09_0001"
        store.close()
        shutil.rmtree(home)
        line += 4


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    """A process killed while it accepts as fast as it can loses no job it has told of."""
    code = """
import sys
from pathlib import Path
from radiance_mlx.messages import Example
from radiance_mlx.store import Store
store = Store(Path(sys.argv[1]))
while True:
    job, _ = store.accept([Example(text="a")], [], raw=b"raw", curated={"examples.jsonl": b"curated"},
                          body_hash="h")
    print(job.job_id, flush=True)
"""
    process = python(code, str(tmp_path))
    assert process.stdout is not None
    told = [process.stdout.readline().strip() for _ in range(20)]
    process.kill()
    told += process.stdout.read().split()
    process.wait()
    process.stdout.close()
    known = [job["job_id"] for job in reversed(snapshot(tmp_path)["jobs"])]
    assert known[: len(told)] == told
    assert len(known) <= len(told) + 1
