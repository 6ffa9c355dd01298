"""The store: what it promises about jobs, checkpoints and events, and that it keeps it through crashes."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import radiance_mlx.store as store_package
from radiance_mlx.errors import (
    Cancelled,
    CheckpointDamaged,
    Conflict,
    HomeLocked,
    IdempotencyMismatch,
    NotFound,
    StoreError,
)
from radiance_mlx.messages import FINAL_STATES, Example
from radiance_mlx.store import CheckpointRecord, HomeLock, JobRecord, Store, write_durably
from radiance_mlx.store.database import Database
from radiance_mlx.store.jobs import TRANSITIONS
from radiance_mlx.store.migrations import MIGRATIONS

BASE = "base-hash"
FIRST_DAY = 1_770_638_400.0  # 2026-02-09 12:00 UTC
PACKAGE = str(Path(store_package.__file__).parent)
ROOT = Path(store_package.__file__).parents[2]


class Clock:
    """Time that moves only when a test says so."""

    def __init__(self) -> None:
        self.now = FIRST_DAY

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    opened = Store(tmp_path, clock)
    yield opened
    opened.close()


def accept(store: Store, *texts: str, key: str | None = None, body_hash: str = "hash", **more: Any) -> JobRecord:
    examples = [Example(text=text) for text in texts or ("one",)]
    curated = {"examples.jsonl": b"curated"}
    job, _ = store.accept(
        examples, ["user:a"], raw=b"raw", curated=curated, idempotency_key=key, body_hash=body_hash, **more
    )
    return job


def record(checkpoint: str, parent: str | None = None, jobs: tuple[str, ...] = (), **more: Any) -> CheckpointRecord:
    values: dict[str, Any] = {
        "checkpoint": checkpoint,
        "number": int(checkpoint.rpartition("_")[2]),
        "base_hash": BASE,
        "parent": parent,
        "status": "stable",
        "created": FIRST_DAY,
        "jobs": jobs,
        "data_hash": "data",
        "files": {"adapters.safetensors": "sha"},
        "metrics": {"finetune_loss": 0.5},
        "config": {"r": 8},
    }
    return CheckpointRecord(**(values | more))


def train(store: Store, parent: str | None = None, **more: Any) -> str:
    """One job, all the way to a published checkpoint."""
    job = accept(store)
    checkpoint = store.start_batch([job.job_id], more.get("base_hash", BASE))
    store.publish(record(checkpoint, parent, (job.job_id,), **more), events=[("published", {"id": checkpoint})])
    return checkpoint


def chain(store: Store, length: int) -> list[str]:
    ids: list[str] = []
    for _ in range(length):
        ids.append(train(store, ids[-1] if ids else None))
    return ids


def statuses(store: Store) -> list[str]:
    return [one.status for one in store.checkpoints()]


# accepting


def test_accept_makes_a_queued_job_with_all_its_fields(store: Store, clock: Clock) -> None:
    """A job has a rising number, the time of the clock, what was posted, and nothing else yet."""
    job, new = store.accept([Example(text="a"), Example(text="b")], ("x", "y"), raw=b"{}", curated={}, body_hash="h")
    assert new
    assert asdict(job) == {
        "job_id": "job_000001",
        "number": 1,
        "state": "queued",
        "created": clock.now,
        "updated": clock.now,
        "tags": ("x", "y"),
        "example_count": 2,
        "attempts": 0,
        "checkpoint": None,
        "error": None,
        "notes": (),
        "progress": None,
        "idempotency_key": None,
        "body_hash": "h",
        "cancel_requested": False,
        "consolidates": None,
        "terms": None,
    }
    assert store.job("job_000001") == job
    assert accept(store).job_id == "job_000002"


def test_accept_writes_the_posted_data_as_files(store: Store, tmp_path: Path) -> None:
    """The raw body and each curated file lie under the job's id, byte for byte."""
    curated = {"a.jsonl": b"A\n", "b.jsonl": b"\x00B"}
    job, _ = store.accept([Example(text="a")], [], raw=b'{"r": 1}', curated=curated, body_hash="h")
    assert (tmp_path / "data/raw" / f"{job.job_id}.json").read_bytes() == b'{"r": 1}'
    folder = tmp_path / "data/curated" / job.job_id
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == curated


def test_accept_overwrites_what_a_crash_left_under_the_id(store: Store, tmp_path: Path) -> None:
    """Orphans of a job that was never committed do not mix with the files of the job that gets its id."""
    leftover = tmp_path / "data/curated/job_000001"
    leftover.mkdir()
    (leftover / "old.jsonl").write_bytes(b"old")
    (tmp_path / "data/raw/job_000001.json").write_bytes(b"a longer old body")
    accept(store)
    assert [path.name for path in leftover.iterdir()] == ["examples.jsonl"]
    assert (tmp_path / "data/raw/job_000001.json").read_bytes() == b"raw"


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "/etc/x"])
def test_accept_takes_plain_file_names_only(store: Store, name: str) -> None:
    """A curated name cannot lead out of the job's folder, and the refusal leaves no job behind."""
    with pytest.raises(ValueError, match="plain file names"):
        store.accept([Example(text="a")], [], raw=b"", curated={name: b""}, body_hash="h")
    assert store.jobs() == []


def test_accept_that_cannot_write_its_files_makes_no_job(store: Store, tmp_path: Path) -> None:
    """When the data cannot be kept, the update is refused with an error for people, and the id stays free."""
    (tmp_path / "data/raw/job_000001.json").mkdir()
    with pytest.raises(StoreError) as caught:
        accept(store)
    assert caught.value.hint
    assert store.jobs() == []
    assert store.examples_of(["job_000001"]) == []
    (tmp_path / "data/raw/job_000001.json").rmdir()
    assert accept(store).job_id == "job_000001"


def test_accept_can_wait_for_review(store: Store) -> None:
    """A job accepted for review is not trained until it is let into the queue."""
    job = accept(store, state="review")
    assert store.queued() == []
    store.set_state([job.job_id], "queued")
    assert [one.job_id for one in store.queued()] == [job.job_id]


def test_same_key_and_body_is_one_job(store: Store) -> None:
    """A repeated post answers with the first job as it now stands, and stores nothing."""
    first = accept(store, "a", key="k")
    store.set_state([first.job_id], "paused")
    again, new = store.accept([Example(text="b")], [], raw=b"other", curated={}, idempotency_key="k", body_hash="hash")
    assert not new
    assert (again.job_id, again.state) == (first.job_id, "paused")
    assert store.count_jobs()["paused"] == 1
    assert len(store.jobs()) == 1


def test_same_key_with_another_body_is_refused(store: Store) -> None:
    """A key is bound to the body that it first came with; without keys equal bodies are two jobs."""
    accept(store, key="k")
    with pytest.raises(IdempotencyMismatch, match="job_000001"):
        accept(store, key="k", body_hash="another")
    assert len(store.jobs()) == 1
    accept(store)
    accept(store)
    assert len(store.jobs()) == 3


# reading jobs


def test_unknown_ids_are_not_found(store: Store) -> None:
    """Whatever names a job or a checkpoint that is not there raises NotFound with a hint."""
    calls: list[Callable[[], object]] = [
        lambda: store.job("job_9"),
        lambda: store.cancel("job_9"),
        lambda: store.set_state(["job_9"], "paused"),
        lambda: store.add_notes(["job_9"], ["n"]),
        lambda: store.start_batch(["job_9"], BASE),
        lambda: store.requeue(["job_9"]),
        lambda: store.checkpoint("A_9"),
        lambda: store.lineage(BASE, "A_9"),
        lambda: store.move_stable(BASE, "A_9", "why"),
        lambda: store.mark_damaged("A_9", "why"),
        lambda: store.mark_pruned(["A_9"]),
    ]
    for call in calls:
        with pytest.raises(NotFound) as caught:
            call()
        assert caught.value.hint


def test_jobs_are_listed_newest_first_in_pages(store: Store) -> None:
    """`before` continues a page, `state` filters, `limit` bounds."""
    for _ in range(5):
        accept(store)
    store.set_state(["job_000002", "job_000004"], "paused")
    assert [job.number for job in store.jobs()] == [5, 4, 3, 2, 1]
    assert [job.number for job in store.jobs(limit=2)] == [5, 4]
    assert [job.number for job in store.jobs(limit=2, before=4)] == [3, 2]
    assert [job.number for job in store.jobs(state="paused")] == [4, 2]
    assert [job.number for job in store.jobs(state="paused", before=4)] == [2]
    assert store.jobs(state="failed") == []


def test_jobs_are_counted_by_state(store: Store) -> None:
    """Every state is in the count, those without jobs with 0."""
    accept(store)
    accept(store)
    store.cancel("job_000001")
    counts = store.count_jobs()
    assert set(counts) == set(TRANSITIONS)
    assert {state: number for state, number in counts.items() if number} == {"queued": 1, "cancelled": 1}


def test_the_queue_is_oldest_first(store: Store, clock: Clock) -> None:
    """Only queued jobs wait."""
    for _ in range(3):
        accept(store)
        clock.now += 10
    store.set_state(["job_000001"], "paused")
    assert [job.number for job in store.queued()] == [2, 3]


def test_examples_come_back_in_order_of_acceptance(store: Store) -> None:
    """Whatever the order of the ids, and in each of the forms an example has, odd text included."""
    chat = Example(messages=(("system", "s"), ("user", "u"), ("assistant", "\ud800 é")))
    pair = Example(messages=(("user", "q"), ("assistant", "a")))
    for examples in ([Example(text="1"), pair], [chat], [Example(text="3")]):
        store.accept(examples, [], raw=b"", curated={}, body_hash="h")
    wanted = [("job_000001", Example(text="1")), ("job_000001", pair), ("job_000002", chat)]
    assert store.examples_of(["job_000002", "job_000001", "job_000002", "job_9"]) == wanted


# states


def in_state(store: Store, state: str) -> str:
    """A new job, led to `state`."""
    job_id = accept(store, state="review" if state == "review" else "queued").job_id
    if state in ("training", "evaluating", "published", "rejected"):
        checkpoint = store.start_batch([job_id], BASE)
        if state == "published":
            store.publish(record(checkpoint, jobs=(job_id,)), events=[])
        elif state != "training":
            store.set_state([job_id], state)
    elif state not in ("review", "queued"):
        store.set_state([job_id], state)
    return job_id


@pytest.mark.parametrize("source", sorted(TRANSITIONS))
def test_only_the_allowed_transitions_happen(store: Store, source: str) -> None:
    """`set_state` reaches exactly the states of the table; any other is a Conflict that changes nothing."""
    for target in [*TRANSITIONS, "no_such_state"]:
        job_id = in_state(store, source)
        if target in TRANSITIONS[source]:
            store.set_state([job_id], target)
            assert store.job(job_id).state == target
        else:
            with pytest.raises(Conflict, match=f"{job_id} is {source}"):
                store.set_state([job_id], target)
            assert store.job(job_id).state == source


def test_final_states_are_final() -> None:
    """The table lets nothing out of a final state, and reaches every state it names."""
    assert all((not targets) == (state in FINAL_STATES) for state, targets in TRANSITIONS.items())
    assert set().union(*TRANSITIONS.values()) <= set(TRANSITIONS)


def test_set_state_moves_all_jobs_or_none(store: Store) -> None:
    """One job that may not move keeps the others where they are, and the error names it."""
    accept(store)
    accept(store)
    store.cancel("job_000002")
    with pytest.raises(Conflict, match="job_000002 is cancelled") as caught:
        store.set_state(["job_000001", "job_000002"], "paused", notes=["n"])
    assert caught.value.details == [{"job_id": "job_000002", "state": "cancelled"}]
    assert (store.job("job_000001").state, store.job("job_000001").notes) == ("queued", ())


def test_errors_notes_and_progress_stay_with_the_job(store: Store, clock: Clock) -> None:
    """Notes add up; an error is kept as it came; progress is taken only while the job trains."""
    job_id = accept(store).job_id
    store.add_notes([job_id], ["one"])
    store.save_progress([job_id], {"step": 1})
    assert store.job(job_id).progress is None
    store.start_batch([job_id], BASE)
    clock.now += 5
    store.save_progress([job_id], {"step": 2})
    assert store.job(job_id).progress == {"step": 2}
    assert store.job(job_id).updated == clock.now
    error = {"code": "non_finite", "message": "m", "hint": "h"}
    store.set_state([job_id], "failed", error=error, notes=["two", "three"])
    store.save_progress([job_id], {"step": 3})
    job = store.job(job_id)
    assert (job.error, job.notes, job.progress) == (error, ("one", "two", "three"), {"step": 2})


@pytest.mark.parametrize("state", ["review", "queued", "paused"])
def test_a_waiting_job_is_cancelled_at_once(store: Store, state: str) -> None:
    """Cancelling a job that does not train yet ends it."""
    job_id = in_state(store, state)
    assert store.cancel(job_id).state == "cancelled"
    assert store.job(job_id).state == "cancelled"


@pytest.mark.parametrize("state", ["training", "evaluating"])
def test_a_training_job_is_not_cancelled_by_the_store_alone(store: Store, state: str) -> None:
    """The record comes back with the wish noted; its training has to be stopped first."""
    before = store.job(in_state(store, state))
    assert store.cancel(before.job_id) == replace(before, cancel_requested=True) == store.job(before.job_id)


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
def test_an_ended_job_cannot_be_cancelled(store: Store, state: str) -> None:
    """The Conflict says in which state the job ended."""
    job_id = in_state(store, state)
    with pytest.raises(Conflict, match=f"{job_id} is {state}"):
        store.cancel(job_id)


# batches


def test_start_batch_reserves_a_checkpoint_for_its_jobs(store: Store) -> None:
    """The jobs train, one attempt counted, under one id of the day in UTC with a rising number."""
    accept(store)
    accept(store)
    checkpoint = store.start_batch(["job_000001", "job_000002", "job_000001"], BASE)
    assert checkpoint == "A_2026-02-09_0001"
    for job in store.jobs():
        assert (job.state, job.attempts, job.checkpoint) == ("training", 1, checkpoint)


def test_a_batch_of_jobs_that_are_not_all_queued_does_not_start(store: Store) -> None:
    """Nothing changes, and no id is used up; a batch of nothing is a mistake of the caller."""
    accept(store)
    accept(store)
    store.cancel("job_000002")
    with pytest.raises(Conflict, match="job_000002 is cancelled"):
        store.start_batch(["job_000001", "job_000002"], BASE)
    assert store.job("job_000001").state == "queued"
    assert store.start_batch(["job_000001"], BASE).endswith("_0001")
    with pytest.raises(ValueError, match="needs jobs"):
        store.start_batch([], BASE)


def test_a_reserved_id_is_never_given_again(tmp_path: Path, clock: Clock) -> None:
    """Not after a failed batch, a requeue, a restart, on another day, or for another base."""
    given = []
    for end in ("failed", "requeue", "restart", "other"):
        store = Store(tmp_path, clock)
        job = accept(store)
        given.append(store.start_batch([job.job_id], BASE if end != "other" else "other"))
        if end == "failed":
            store.set_state([job.job_id], "failed")
        elif end == "requeue":
            store.requeue([job.job_id])
            store.cancel(job.job_id)
        store.close()
        clock.now += 86_400
    days = ("09_0001", "10_0002", "11_0003", "12_0004")
    assert given == [f"A_2026-02-{day}" for day in days]


def test_ids_do_not_collide_with_checkpoints_that_were_not_reserved(store: Store) -> None:
    """A checkpoint that came from elsewhere, without jobs, also uses up its number."""
    store.publish(record("A_2025-01-01_0007"), events=[])
    accept(store)
    assert store.start_batch(["job_000001"], BASE).endswith("_0008")


def test_interrupted_batches_are_found_by_their_checkpoint(tmp_path: Path, clock: Clock) -> None:
    """After a restart the jobs that trained are there in their groups, and no others."""
    store = Store(tmp_path, clock)
    for _ in range(5):
        accept(store)
    first = store.start_batch(["job_000003", "job_000001"], BASE)
    second = store.start_batch(["job_000002"], BASE)
    store.set_state(["job_000002"], "evaluating")
    third = store.start_batch(["job_000004"], BASE)
    store.set_state(["job_000004"], "failed")
    store.close()
    store = Store(tmp_path, clock)
    found = [(checkpoint, [job.number for job in jobs]) for checkpoint, jobs in store.interrupted()]
    assert found == [(first, [1, 3]), (second, [2])]
    assert third not in dict(found)
    store.close()


@pytest.mark.parametrize("state", ["training", "evaluating"])
def test_a_batch_is_retried_under_its_id(store: Store, state: str) -> None:
    """One more attempt counts, the jobs train from the start; jobs of another batch are refused."""
    job_id = in_state(store, state)
    checkpoint = store.job(job_id).checkpoint
    assert checkpoint is not None
    store.save_progress([job_id], {"step": 1})
    store.retry_batch(checkpoint, [job_id])
    job = store.job(job_id)
    assert (job.state, job.attempts, job.checkpoint, job.progress) == ("training", 2, checkpoint, None)
    with pytest.raises(Conflict, match="another checkpoint"):
        store.retry_batch("A_2026-02-09_0099", [job_id])
    with pytest.raises(Conflict, match="is queued"):
        store.retry_batch(checkpoint, [job_id, accept(store).job_id])
    assert store.job(job_id).attempts == 2


@pytest.mark.parametrize(("counted", "attempts"), [(True, 1), (False, 0)])
def test_a_batch_given_up_is_queued_again(store: Store, counted: bool, attempts: int) -> None:
    """Without its checkpoint; a stop that was asked for does not count as an attempt."""
    job_id = in_state(store, "evaluating")
    store.requeue([job_id], count_attempt=counted)
    job = store.job(job_id)
    assert (job.state, job.attempts, job.checkpoint, job.progress) == ("queued", attempts, None, None)
    with pytest.raises(Conflict, match="is queued"):
        store.requeue([job_id])


# publishing


def test_publish_ends_the_jobs_and_moves_the_pointer(store: Store, clock: Clock) -> None:
    """The row, the jobs, the pointer of the base and the event are there together."""
    job_id = accept(store).job_id
    checkpoint = store.start_batch([job_id], BASE)
    made = record(checkpoint, jobs=(job_id,), notes=("n",))
    store.publish(made, events=[("published", {"id": checkpoint}), ("more", {})])
    assert store.checkpoint(checkpoint) == made == store.checkpoints()[0]
    assert (store.job(job_id).state, store.job(job_id).checkpoint) == ("published", checkpoint)
    assert store.stable(BASE) == checkpoint
    assert store.stable("other") is None
    assert [event["kind"] for event in store.events()] == ["published", "more"]


def test_a_checkpoint_is_published_once(store: Store) -> None:
    """The same id, or the same number under another id, is a Conflict that changes nothing."""
    checkpoint = train(store)
    job_id = accept(store).job_id
    store.start_batch([job_id], BASE)
    for twin in (record(checkpoint), record("A_2030-01-01_0001")):
        with pytest.raises(Conflict, match="published already"):
            store.publish(twin, events=[("published", {})])
    assert len(store.checkpoints()) == len(store.events()) == 1
    assert store.stable(BASE) == checkpoint


def test_publish_takes_only_jobs_that_train_for_it(store: Store) -> None:
    """A job that was cancelled, or that trains for another checkpoint, stops the whole of it."""
    one, two = accept(store).job_id, accept(store).job_id
    first, second = store.start_batch([one], BASE), store.start_batch([two], BASE)
    with pytest.raises(Conflict, match="another checkpoint"):
        store.publish(record(first, jobs=(one, two)), events=[])
    store.set_state([two], "cancelled")
    with pytest.raises(Conflict, match=f"{two} is cancelled"):
        store.publish(record(second, jobs=(two,)), events=[])
    assert store.checkpoints() == []
    assert store.stable(BASE) is None
    assert store.job(one).state == "training"


def test_publish_needs_a_parent_of_its_base(store: Store) -> None:
    """A lineage belongs to one base, and has no gaps."""
    foreign = train(store, base_hash="other")
    with pytest.raises(Conflict, match="another base"):
        store.publish(record("A_2026-02-09_0002", foreign), events=[])
    with pytest.raises(NotFound):
        store.publish(record("A_2026-02-09_0002", "A_2026-02-09_0099"), events=[])
    assert len(store.checkpoints()) == 1


def test_a_rejected_checkpoint_is_recorded_and_not_served(store: Store) -> None:
    """The policy's refusal ends the jobs as rejected and leaves the pointer where it was."""
    first = train(store)
    job_id = accept(store).job_id
    second = store.start_batch([job_id], BASE)
    refused = record(second, first, (job_id,), status="rolled_back")
    with pytest.raises(ValueError, match="rolled_back"):
        store.publish(refused, events=[])
    store.publish(refused, job_state="rejected", events=[("rejected", {})])
    assert store.job(job_id).state == "rejected"
    assert store.stable(BASE) == first
    assert statuses(store) == ["stable", "rolled_back"]


def test_a_risky_checkpoint_is_served(store: Store) -> None:
    """A warning does not keep a checkpoint from becoming the stable one of its base; it keeps its word."""
    checkpoint = train(store, status="risky")
    assert store.stable(BASE) == checkpoint
    assert statuses(store) == ["risky"]


# lineage


def test_lineages_of_bases_are_apart(store: Store) -> None:
    """Each base has its pointer, its list and its chain."""
    one, two = chain(store, 2)
    other = train(store, base_hash="other")
    assert [each.checkpoint for each in store.checkpoints()] == [one, two, other]
    assert [each.checkpoint for each in store.checkpoints(BASE)] == [one, two]
    assert (store.stable(BASE), store.stable("other")) == (two, other)
    assert [each.checkpoint for each in store.lineage(BASE, two)] == [two, one]
    assert store.lineage(BASE, None) == []
    with pytest.raises(Conflict, match="another base"):
        store.lineage(BASE, other)


def test_a_reconsolidation_is_a_job_in_training_without_examples(store: Store, clock: Clock) -> None:
    """Of the stable checkpoint, and of no other, while nothing waits; it is no accepted update, and its end says so."""
    first, second = chain(store, 2)
    waiting = accept(store).job_id
    with pytest.raises(Conflict, match="An update waits"):
        store.start_reconsolidation(BASE, second)
    store.cancel(waiting)
    accepted = store.last_accepted()
    clock.now += 100
    with pytest.raises(Conflict, match="not the stable"):
        store.start_reconsolidation(BASE, first)
    job_id, checkpoint = store.start_reconsolidation(BASE, second)
    job = store.job(job_id)
    assert (job.kind, job.consolidates, job.state, job.attempts) == ("reconsolidation", second, "training", 1)
    assert (job.example_count, store.examples_of([job_id]), store.queued()) == (0, [], [])
    assert [(name, [j.job_id for j in of]) for name, of in store.interrupted()] == [(checkpoint, [job_id])]
    assert store.last_accepted() == accepted
    store.publish(record(checkpoint, second, (job_id,), reconsolidated=True), events=[])
    assert [one.reconsolidated for one in store.checkpoints()] == [False, False, True]


def test_what_was_put_aside_may_be_tried_again_and_what_ended_otherwise_not(store: Store) -> None:
    """A cancellation that somebody asked for is an end; the note and the event are for the others."""
    (first,) = chain(store, 1)
    job_id, _ = store.start_reconsolidation(BASE, first)
    assert store.last_consolidated(BASE) == 1
    store.put_aside(job_id, "an update is due")
    job = store.job(job_id)
    assert (job.state, job.notes) == ("cancelled", ("an update is due",))
    assert store.events()[-1]["kind"] == "put_aside"
    assert (store.last_consolidated(BASE), store.last_consolidated("another")) == (None, None)
    with pytest.raises(Conflict):
        store.put_aside(job_id, "again")
    job_id, _ = store.start_reconsolidation(BASE, first)
    store.cancel(job_id)
    store.put_aside(job_id, "an update is due")
    assert (store.job(job_id).state, store.job(job_id).notes) == ("cancelled", ())
    assert len([event for event in store.events() if event["kind"] == "put_aside"]) == 1
    assert store.last_consolidated(BASE) == 1


def test_rollback_to_an_ancestor_leaves_the_younger_ones_behind(store: Store, clock: Clock) -> None:
    """All between the old place and the target are rolled back; the journal says why."""
    ids = chain(store, 4)
    seen = store.events()[-1]["id"]
    clock.now += 60
    assert store.move_stable(BASE, ids[1], "bad answers") == (ids[3], ids[1])
    assert store.stable(BASE) == ids[1]
    assert statuses(store) == ["stable", "stable", "rolled_back", "rolled_back"]
    data: dict[str, Any] = {"base_hash": BASE, "from": ids[3], "to": ids[1], "reason": "bad answers"}
    data["rolled_back"] = [ids[3], ids[2]]
    assert [
        {"at": clock.now, "kind": "rollback", "data": data, "id": event["id"]} for event in store.events(seen)
    ] == store.events(seen)
    assert len(store.events(seen)) == 1


def test_rollback_to_the_base(store: Store) -> None:
    """The whole chain is left behind, and the next update starts from the base."""
    chain(store, 2)
    store.move_stable(BASE, None, "all bad")
    assert store.stable(BASE) is None
    assert statuses(store) == ["rolled_back", "rolled_back"]
    assert store.move_stable(BASE, None, "again") == (None, None)


def test_moving_forward_again_keeps_what_the_target_stands_on(store: Store) -> None:
    """To a descendant of the old place: nothing is left behind, and the whole way to it is stable again."""
    ids = chain(store, 3)
    store.move_stable(BASE, ids[0], "back")
    assert store.move_stable(BASE, ids[2], "forward", kind="promoted") == (ids[0], ids[2])
    assert statuses(store) == ["stable", "stable", "stable"]
    assert store.events()[-1]["kind"] == "promoted"


def test_moving_to_another_branch_leaves_the_old_branch_behind(store: Store) -> None:
    """What only the old place stood on is rolled back; what both stand on stays."""
    one, two, three = chain(store, 3)
    store.move_stable(BASE, one, "back")
    branch = train(store, one)
    tip = train(store, branch)
    store.move_stable(BASE, three, "the old branch was better")
    assert statuses(store) == ["stable", "stable", "stable", "rolled_back", "rolled_back"]
    assert [each.checkpoint for each in store.checkpoints()] == [one, two, three, branch, tip]


def test_a_risky_target_stays_risky_and_a_candidate_becomes_stable(store: Store) -> None:
    """The pointer says which is current; the word says what is known of it."""
    risky = train(store, status="risky")
    train(store, risky)
    store.move_stable(BASE, risky, "back")
    assert statuses(store)[0] == "risky"
    candidate = record("A_2026-02-09_0009", risky, status="candidate")
    store.publish(candidate, job_state="rejected", events=[])
    store.move_stable(BASE, candidate.checkpoint, "a second look")
    assert store.checkpoint(candidate.checkpoint).status == "stable"


def test_moving_to_where_the_pointer_is_changes_nothing(store: Store) -> None:
    """No status and no event comes of it."""
    ids = chain(store, 2)
    before = store.events()
    assert store.move_stable(BASE, ids[1], "why") == (ids[1], ids[1])
    assert store.events() == before
    assert statuses(store) == ["stable", "stable"]


def test_the_pointer_moves_to_usable_checkpoints_only(store: Store) -> None:
    """Not to a pruned, a damaged or a foreign one; the refusal changes nothing."""
    ids = chain(store, 3)
    foreign = train(store, base_hash="other")
    store.mark_pruned([ids[0]])
    store.mark_damaged(ids[1], "adapters.safetensors is missing")
    assert store.checkpoint(ids[0]).pruned
    assert not store.checkpoint(ids[2]).pruned
    assert store.checkpoint(ids[1]).damaged == "adapters.safetensors is missing"
    refusals: list[tuple[str, type[Exception], str]] = [
        (ids[0], Conflict, "removed"),
        (ids[1], CheckpointDamaged, "adapters.safetensors is missing"),
        (foreign, Conflict, "another base"),
    ]
    for target, error, text in refusals:
        with pytest.raises(error, match=text):
            store.move_stable(BASE, target, "why")
    assert store.stable(BASE) == ids[2]
    assert statuses(store) == ["stable"] * 4


def test_the_stable_checkpoint_is_not_pruned(store: Store) -> None:
    """Nor the others named with it."""
    ids = chain(store, 2)
    with pytest.raises(Conflict, match=ids[1]):
        store.mark_pruned(ids)
    assert not store.checkpoint(ids[0]).pruned


# events and remembered values


def test_events_are_read_on_from_where_one_was(store: Store, clock: Clock) -> None:
    """Ids rise, `after` continues, `limit` bounds, data comes back as it was."""
    ids = [store.event("kind", {"n": number, "deep": {"a": [1, None]}}) for number in range(4)]
    assert ids == sorted(set(ids))
    first = {"id": ids[0], "at": clock.now, "kind": "kind", "data": {"n": 0, "deep": {"a": [1, None]}}}
    assert store.events(limit=1) == [first]
    assert [event["data"]["n"] for event in store.events(ids[1])] == [2, 3]
    assert store.events(ids[3]) == []


def test_values_are_remembered_by_name(tmp_path: Path, store: Store) -> None:
    """The last value put is got, also after a restart."""
    assert store.get("last base hash") is None
    store.put("last base hash", "a")
    store.put("last base hash", "b")
    store.close()
    again = Store(tmp_path)
    assert again.get("last base hash") == "b"
    again.close()


# the database


def test_pragmas_make_a_commit_durable(tmp_path: Path, store: Store) -> None:
    """Write-ahead log, full sync and foreign keys are on."""
    with store._database.read() as db:
        values = {name: db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "foreign_keys")}
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        if sys.platform == "darwin":
            assert db.execute("PRAGMA fullfsync").fetchone()[0] == 1
            assert db.execute("PRAGMA checkpoint_fullfsync").fetchone()[0] == 1
    assert values == {"synchronous": 2, "foreign_keys": 1}


def test_migrations_run_once_each_and_keep_the_data(tmp_path: Path, clock: Clock) -> None:
    """A newer version's step runs on an older database, and is recorded with its time."""
    path = tmp_path / "old.db"
    Database(path, clock, MIGRATIONS[:1]).close()
    raw = sqlite3.connect(path)
    raw.execute(
        """INSERT INTO jobs (number, job_id, state, created, updated, tags, example_count, body_hash)
           VALUES (1, 'job_000001', 'queued', 0, 0, '[]', 0, 'h')"""
    )
    raw.commit()
    clock.now += 100
    Database(path, clock).close()
    Database(path, clock).close()
    done = dict(raw.execute("SELECT name, at FROM migrations").fetchall())
    assert list(done) == [step.__name__ for step in MIGRATIONS]
    assert (done["create_jobs"], done["create_meta"]) == (FIRST_DAY, FIRST_DAY + 100)
    assert raw.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
    raw.close()


def test_a_step_that_fails_leaves_no_trace(tmp_path: Path, clock: Clock) -> None:
    """Its tables are gone with its record, and the next start can run it again."""

    def broken(db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE half (a)")
        raise RuntimeError("broken")

    path = tmp_path / "some.db"
    with pytest.raises(RuntimeError, match="broken"):
        Database(path, clock, (*MIGRATIONS, broken))
    database = Database(path, clock)
    with database.read() as db:
        assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone()[0] == 0
    database.close()


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path, store: Store) -> None:
    """The error names the step that is not known and says what to do; the file is not touched."""
    store.close()
    raw = sqlite3.connect(tmp_path / "state/radiance.db")
    raw.execute("INSERT INTO migrations VALUES ('create_telepathy', 0)")
    raw.commit()
    before = list(raw.iterdump())
    with pytest.raises(StoreError, match="create_telepathy") as caught:
        Store(tmp_path)
    assert "Upgrade" in caught.value.hint
    assert list(raw.iterdump()) == before
    raw.close()


def test_a_file_that_is_no_database_is_told_as_such(tmp_path: Path) -> None:
    """Neither a traceback of sqlite3 nor a new database over the old file."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state/radiance.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(StoreError) as caught:
        Store(tmp_path)
    assert caught.value.hint
    assert (tmp_path / "state/radiance.db").read_bytes().startswith(b"not a database")


def test_a_home_that_cannot_be_used_is_told_as_such(tmp_path: Path) -> None:
    """A file where a folder should be, for the store and for the lock."""
    (tmp_path / "home").write_bytes(b"")
    for use in (lambda: Store(tmp_path / "home"), lambda: HomeLock(tmp_path / "home").acquire()):
        with pytest.raises(StoreError) as caught:
            use()
        assert caught.value.hint
        assert not isinstance(caught.value, HomeLocked)


def test_a_database_from_before_reconsolidations_goes_on(tmp_path: Path, clock: Clock) -> None:
    """Its jobs are updates, its checkpoints came of them."""
    (tmp_path / "state").mkdir()
    steps = MIGRATIONS[: [step.__name__ for step in MIGRATIONS].index("tell_reconsolidations")]
    path = tmp_path / "state" / "radiance.db"
    Database(path, clock, steps).close()
    raw = sqlite3.connect(path)
    raw.execute(
        """INSERT INTO jobs (number, job_id, state, created, updated, tags, example_count, body_hash)
           VALUES (1, 'job_000001', 'published', 7, 7, '[]', 0, 'h')"""
    )
    raw.execute(
        """INSERT INTO checkpoints VALUES
           ('A_2026-02-09_0001', 1, 'b', NULL, 'stable', 7, '["job_000001"]', 'd', '{}', '{}', '{}', '[]', NULL, 0)"""
    )
    raw.commit()
    raw.close()
    store = Store(tmp_path, clock)
    assert (store.job("job_000001").kind, store.last_accepted()) == ("update", 7.0)
    assert [one.reconsolidated for one in store.checkpoints()] == [False]
    assert store.last_consolidated("b") is None
    store.close()


def test_events_of_a_job_are_found_without_reading_the_journal(tmp_path: Path, clock: Clock) -> None:
    """Also those from before events were indexed by job; and the examples of a file were called rows."""
    (tmp_path / "state").mkdir()
    steps = MIGRATIONS[: [step.__name__ for step in MIGRATIONS].index("index_events_by_job")]
    path = tmp_path / "state" / "radiance.db"
    Database(path, clock, steps).close()
    raw = sqlite3.connect(path)
    raw.executemany(
        "INSERT INTO events (at, kind, data) VALUES (7, 'progress', ?)",
        [(f'{{"jobs": ["job_{i % 1000:06d}", "job_{i % 1000:06d}"], "i": {i}}}',) for i in range(5000)],
    )
    raw.execute("""INSERT INTO events (at, kind, data) VALUES (7, 'moved', '{"why": "x"}')""")
    raw.execute("INSERT INTO uploads VALUES (1, 'file-a', 'a.jsonl', 'fine-tune', 1, 3, 'h', 7)")
    raw.commit()
    raw.close()
    store = Store(tmp_path, clock)
    last = store.event("published", {"jobs": ["job_000007", "job_000008"]})
    looks: list[int] = []
    store._database._connection.set_progress_handler(lambda: looks.append(1), 100)
    found = store.events_of("job_000007")
    assert [event["data"].get("i") for event in found] == [7, 1007, 2007, 3007, 4007, None]
    assert [event["id"] for event in store.events_of("job_000007", found[-2]["id"])] == [last]
    assert store.events_of("job_999999") == []
    assert len(looks) < 10
    store._database._connection.set_progress_handler(None, 0)
    assert store.uploads.one("file-a").examples == 3
    store.close()


def test_a_busy_database_raises_store_error_and_the_store_goes_on(tmp_path: Path, store: Store) -> None:
    """Another program that holds the file makes a write fail with a hint; afterwards writes work again."""
    other = sqlite3.connect(tmp_path / "state/radiance.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with store._database.read() as db:
        db.execute("SELECT 1")
    store._database._connection.execute("PRAGMA busy_timeout=10")
    with pytest.raises(StoreError, match="locked"):
        store.put("a", "1")
    other.execute("ROLLBACK")
    other.close()
    store.put("a", "1")
    assert store.get("a") == "1"


def test_the_files_of_the_store_may_be_closed_twice(store: Store) -> None:
    """Closing is for every way out."""
    store.close()
    store.close()


# durable files


def test_write_durably_replaces_the_whole_content(tmp_path: Path) -> None:
    """The new bytes are there, and no file beside them."""
    path = tmp_path / "file.json"
    write_durably(path, b"a long first content")
    write_durably(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["file.json"]


def test_write_durably_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    """A target that cannot be replaced keeps what it had, and no temporary file stays."""
    (tmp_path / "target/full").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_durably(tmp_path / "target", b"x")
    assert os.listdir(tmp_path) == ["target"]
    with pytest.raises(FileNotFoundError):
        write_durably(tmp_path / "missing/file", b"x")


# crashes


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


def python(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


# the lock

HOLD = """
import sys
from pathlib import Path
from radiance_mlx.store import HomeLock
with HomeLock(Path(sys.argv[1]), lambda: 1_770_638_400.0):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_the_home(tmp_path: Path) -> None:
    """It does not wait; it names the pid and the time; after a kill -9 the home is free at once."""
    process = python(HOLD, str(tmp_path))
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "held\n"
    since = datetime.fromtimestamp(FIRST_DAY).strftime("%Y-%m-%d %H:%M")
    with pytest.raises(HomeLocked) as caught:
        HomeLock(tmp_path).acquire()
    assert f"process {process.pid} " in caught.value.message
    assert since in caught.value.message
    assert caught.value.hint
    assert caught.value.details["pid"] == process.pid
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stdin.close()
    assert (tmp_path / "state/holder.json").exists()
    with HomeLock(tmp_path):
        assert json.loads((tmp_path / "state/holder.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "state/holder.json").exists()


def test_the_lock_is_free_after_its_block_and_holds_within_one_process(tmp_path: Path) -> None:
    """Two locks of one process exclude each other too; releasing twice, or from an error, is no fault."""
    lock = HomeLock(tmp_path)
    with lock, pytest.raises(HomeLocked, match=str(os.getpid())):
        HomeLock(tmp_path).acquire()
    lock.release()
    with pytest.raises(RuntimeError, match="inside"), lock:
        raise RuntimeError("inside")
    with HomeLock(tmp_path):
        pass


@pytest.mark.parametrize("left", [b"", b"[]", b'{"pid": "x"}', b"\xff"])
def test_an_unreadable_holder_file_is_no_obstacle(tmp_path: Path, left: bytes) -> None:
    """It is overwritten by the next holder; and a process that finds the home locked says what it knows."""
    lock = HomeLock(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state/holder.json").write_bytes(left)
    with lock:
        (tmp_path / "state/holder.json").write_bytes(left)
        with pytest.raises(HomeLocked, match="another process"):
            HomeLock(tmp_path).acquire()


def test_the_holder_file_keeps_no_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token on the command line does not get into a file."""
    monkeypatch.setattr(sys, "argv", ["/x/radiance-mlx", "run", "--token", "secret"])
    with HomeLock(tmp_path):
        text = (tmp_path / "state/holder.json").read_text()
    assert json.loads(text)["command"] == "radiance-mlx run"
    assert "secret" not in text


def test_who_holds_the_home_is_named_as_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m` hands the program the path of a file that nobody types."""
    monkeypatch.setattr(sys, "argv", ["/x/radiance_mlx/__main__.py", "run"])
    with HomeLock(tmp_path), pytest.raises(HomeLocked, match=r"\(python -m radiance_mlx run\)"):
        HomeLock(tmp_path).acquire()


# everything at once


class AnyOrder(RuleBasedStateMachine):
    """Calls in any order, with restarts between: the store agrees with a model of a few lines."""

    @initialize()
    def start(self) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.store = Store(self.home, self.clock)
        self.states: dict[str, str] = {}
        self.given: list[str] = []
        self.lineage: list[str] = []

    def teardown(self) -> None:
        if hasattr(self, "home"):
            self.store.close()
            shutil.rmtree(self.home)

    def those_in(self, *states: str) -> list[str]:
        return [job_id for job_id, state in self.states.items() if state in states]

    @rule(state=st.sampled_from(["queued", "review"]))
    def accept(self, state: str) -> None:
        self.states[accept(self.store, state=state).job_id] = state

    @precondition(lambda self: self.states)
    @rule(data=st.data(), wanted=st.sampled_from(sorted(TRANSITIONS)))
    def set_state(self, data: st.DataObject, wanted: str) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.states)))
        if wanted in TRANSITIONS[self.states[job_id]]:
            self.store.set_state([job_id], wanted)
            self.states[job_id] = wanted
        else:
            with pytest.raises(Conflict):
                self.store.set_state([job_id], wanted)

    @precondition(lambda self: self.those_in("queued"))
    @rule()
    def start_batch(self) -> None:
        ids = self.those_in("queued")
        checkpoint = self.store.start_batch(ids, BASE)
        assert checkpoint not in self.given
        self.given.append(checkpoint)
        self.states |= dict.fromkeys(ids, "training")

    @precondition(lambda self: self.those_in("training", "evaluating"))
    @rule(end=st.sampled_from(["publish", "retry", "requeue"]))
    def go_on(self, end: str) -> None:
        checkpoint, jobs = self.store.interrupted()[0]
        ids = tuple(job.job_id for job in jobs)
        if end == "publish":
            self.store.publish(record(checkpoint, self.store.stable(BASE), ids), events=[])
            self.lineage.append(checkpoint)
            self.states |= dict.fromkeys(ids, "published")
        elif end == "retry":
            self.store.retry_batch(checkpoint, ids)
            self.states |= dict.fromkeys(ids, "training")
        else:
            self.store.requeue(ids)
            self.states |= dict.fromkeys(ids, "queued")

    @precondition(lambda self: self.lineage)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        self.lineage = self.lineage[: data.draw(st.integers(0, len(self.lineage)))]
        self.store.move_stable(BASE, self.lineage[-1] if self.lineage else None, "why")

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.clock.now += 86_400
        self.store = Store(self.home, self.clock)

    @invariant()
    def agrees(self) -> None:
        assert {job.job_id: job.state for job in self.store.jobs()} == self.states
        assert [job.job_id for job in self.store.queued()] == self.those_in("queued")
        found = [job.job_id for _, jobs in self.store.interrupted() for job in jobs]
        assert sorted(found) == self.those_in("training", "evaluating")
        chain = self.store.lineage(BASE, self.store.stable(BASE))
        assert [one.checkpoint for one in reversed(chain)] == self.lineage
        trained = [job_id for one in self.store.checkpoints() for job_id in one.jobs]
        assert sorted(trained) == self.those_in("published")


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=15,
    stateful_step_count=20,
    deadline=None,  # syncing takes as long as the disk takes
    suppress_health_check=[HealthCheck.too_slow],
)


def test_a_record_cannot_be_changed(store: Store) -> None:
    """Records are values: a change makes another one."""
    job = accept(store)
    with pytest.raises(AttributeError):
        job.state = "published"  # type: ignore[misc]
    assert replace(job, state="paused").state == "paused"


def test_the_wish_to_cancel_a_job_in_training_survives(tmp_path: Path) -> None:
    """Whoever reads the job after a restart sees that it is not wanted any more."""
    store = Store(tmp_path)
    job = accept(store, "a")
    store.start_batch([job.job_id], BASE)
    assert not store.job(job.job_id).cancel_requested
    assert store.cancel(job.job_id).state == "training"
    store.close()
    again = Store(tmp_path)
    assert again.interrupted()[0][1][0].cancel_requested
    again.close()


def test_a_batch_with_a_job_to_be_cancelled_is_not_published(store: Store) -> None:
    """Nothing of it; given up, that job is cancelled and the others are queued again."""
    bad, good = accept(store).job_id, accept(store).job_id
    checkpoint = store.start_batch([bad, good], BASE)
    store.cancel(bad)
    with pytest.raises(Cancelled, match=bad):
        store.publish(record(checkpoint, jobs=(bad, good)), events=[])
    assert (store.checkpoints(), store.stable(BASE)) == ([], None)
    assert store.requeue([bad, good]) == [good]
    assert [store.job(bad).state, store.job(good).state] == ["cancelled", "queued"]


def test_a_mark_of_damage_can_be_taken_back(store: Store) -> None:
    """The pointer may move there again; before, the refusal names the checkpoint once."""
    first = chain(store, 2)[0]
    store.mark_damaged(first, "a file is missing")
    with pytest.raises(CheckpointDamaged) as caught:
        store.move_stable(BASE, first, "why")
    assert caught.value.message.count(first) == 1
    store.mark_damaged(first, None)
    store.move_stable(BASE, first, "why")
    assert store.stable(BASE) == first
