"""When jobs train, and which together."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radiance_mlx.triggers import Decision, decide, reconsolidation_due


@dataclass(frozen=True)
class Job:
    job_id: str
    created: float = 0.0
    example_count: int = 1


def batched(*jobs, now=0.0, max_examples=3, max_age_s=60.0, **options):
    return decide(jobs, "batched", max_examples=max_examples, max_age_s=max_age_s, now=now, **options)


def test_without_jobs_nothing_is_due_and_nothing_will_be():
    assert decide([], "immediate", max_examples=1, max_age_s=1, now=0) == Decision((), None)
    assert batched() == Decision((), None)


def test_immediate_takes_the_oldest_job_by_itself():
    jobs = [Job("a", example_count=500), Job("b"), Job("c")]
    assert decide(jobs, "immediate", max_examples=1, max_age_s=1, now=1e9).jobs == ("a",)


def test_batched_waits_below_both_bounds_and_says_how_long():
    decision = batched(Job("a", created=10.0), Job("b", created=30.0), now=40.0)
    assert decision == Decision((), 30.0)


def test_batched_takes_all_jobs_once_their_examples_are_enough():
    assert batched(Job("a"), Job("b", example_count=2)).jobs == ("a", "b")
    assert batched(Job("a", example_count=900)).jobs == ("a",)


def test_batched_takes_all_jobs_once_the_oldest_has_waited_long_enough():
    """The oldest by its time of acceptance: clocks may have been set back since."""
    assert batched(Job("a", created=50.0), Job("b", created=0.0), now=60.0).jobs == ("a", "b")


def test_a_job_that_failed_in_company_trains_by_itself_and_at_once():
    for mode in ("immediate", "batched"):
        jobs = [Job("a"), Job("b"), Job("c")]
        decision = decide(jobs, mode, max_examples=3, max_age_s=60, now=0, alone={"b", "c"})
        assert decision.jobs == ("b",)


def test_what_was_already_in_training_is_due_with_all_that_wait():
    assert batched(Job("a"), Job("b"), due={"b"}).jobs == ("a", "b")
    assert batched(Job("a"), due={"gone"}) == Decision((), 60.0)


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 50)), min_size=1, max_size=8),
    st.floats(0, 1e7),
    st.integers(1, 100),
    st.floats(0.1, 1e6),
)
def test_batched_always_either_trains_everything_or_names_a_wait_that_is_not_over(jobs, now, most, age):
    waiting = [Job(f"j{i}", created, count) for i, (created, count) in enumerate(jobs)]
    decision = batched(*waiting, now=now, max_examples=most, max_age_s=age)
    if decision.jobs:
        assert decision.jobs == tuple(job.job_id for job in waiting)
    else:
        assert decision.wait_s is not None
        assert decision.wait_s > 0
        assert sum(job.example_count for job in waiting) < most


@pytest.mark.parametrize("now", [-1e9, 0.0])
def test_a_clock_that_was_set_back_delays_and_nothing_worse(now):
    decision = batched(Job("a", created=100.0), now=now)
    assert decision.jobs == ()
    assert decision.wait_s == 60.0 + 100.0 - now


# --- the whole log, when idle --------------------------------------------------------------------


def due(**facts):
    known = {"learnt": 8, "after_updates": 8, "done": False, "last_accepted": 1000.0, "idle_s": 600.0, "now": 1600.0}
    return reconsolidation_due(**{**known, **facts})


def test_the_log_is_trained_anew_once_enough_was_learnt_and_nothing_came_for_long_enough():
    assert due() == due(learnt=9) == due(now=1e9) == 0


def test_until_it_has_been_idle_for_long_enough_it_waits_for_the_rest():
    assert due(now=1000.0) == 600
    assert due(now=1599.0) == 1


def test_too_little_learnt_or_tried_already_is_not_until_something_changes():
    """However long it has been idle."""
    assert due(learnt=7, now=1e9) is None
    assert due(learnt=0, after_updates=1, now=1e9) is None
    assert due(done=True, now=1e9) is None


def test_a_clock_that_was_set_back_delays_the_log_and_nothing_worse():
    assert due(now=0.0) == 1600
