"""The store's checkpoints: how a batch becomes one, which of them is stable, and the way back."""

from pathlib import Path
from typing import Any

import pytest
from stores import BASE, Clock, accept, chain, in_state, record, statuses, train
from stores import clock as clock
from stores import store as store

from radiance_mlx.errors import Cancelled, CheckpointDamaged, Conflict, NotFound
from radiance_mlx.store import Store

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


# the pointer


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
