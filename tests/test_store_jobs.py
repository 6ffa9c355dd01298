"""The store's jobs: what is accepted under which id, which states follow which, and how one is cancelled."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from stores import BASE, Clock, accept, in_state, train
from stores import clock as clock
from stores import store as store

from radiance_mlx.errors import Conflict, IdempotencyMismatch, NotFound, StoreError
from radiance_mlx.messages import FINAL_STATES, Example
from radiance_mlx.store import Store
from radiance_mlx.store.jobs import TRANSITIONS

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


def test_a_record_cannot_be_changed(store: Store) -> None:
    """Records are values: a change makes another one."""
    job = accept(store)
    with pytest.raises(AttributeError):
        job.state = "published"  # type: ignore[misc]
    assert replace(job, state="paused").state == "paused"


# cancelling


def cancellations(store: Store) -> list[list[str]]:
    """The jobs of each event that tells of one."""
    return [event["data"]["jobs"] for event in store.events() if event["kind"] == "cancelled"]


@pytest.mark.parametrize("state", ["review", "queued", "paused"])
def test_a_waiting_job_is_cancelled_at_once(store: Store, state: str) -> None:
    """Cancelling a job that does not train yet ends it."""
    job_id = in_state(store, state)
    assert store.cancel(job_id).state == "cancelled"
    assert store.job(job_id).state == "cancelled"
    assert cancellations(store) == [[job_id]]


@pytest.mark.parametrize("state", ["training", "evaluating"])
def test_a_training_job_is_not_cancelled_by_the_store_alone(store: Store, state: str) -> None:
    """The record comes back with the wish noted; its training has to be stopped first."""
    before = store.job(in_state(store, state))
    assert store.cancel(before.job_id) == replace(before, cancel_requested=True) == store.job(before.job_id)
    assert cancellations(store) == []


def test_a_cancellation_is_told_when_the_training_has_stopped(store: Store) -> None:
    """Whichever way it stops: the batch given up, the job held, a reconsolidation put aside."""
    first, second, third = (accept(store).job_id for _ in range(3))
    store.start_batch([first, second], BASE)
    store.cancel(first)
    assert store.requeue([first, second]) == [second]
    store.start_batch([third], BASE)
    store.cancel(third)
    assert not store.hold(third)
    assert cancellations(store) == [[first], [third]]
    store.start_batch([second], BASE)
    assert store.requeue([second]) == [second]
    store.cancel(second)
    checkpoint = train(store)
    anew, _ = store.start_reconsolidation(BASE, checkpoint)
    store.cancel(anew)
    store.put_aside(anew, "an update is due")
    assert cancellations(store) == [[first], [third], [second], [anew]]
    assert [event["kind"] for event in store.events()].count("put_aside") == 0


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
def test_an_ended_job_cannot_be_cancelled(store: Store, state: str) -> None:
    """The Conflict says in which state the job ended."""
    job_id = in_state(store, state)
    with pytest.raises(Conflict, match=f"{job_id} is {state}"):
        store.cancel(job_id)


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
