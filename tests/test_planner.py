"""The planner's division of time, and seats in the bank: plain values, no arrays, no clock."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from radiance_mlx.engine.planner import OVER, Action, Load, Planner
from radiance_mlx.engine.slots import Slots


def simulate(share, steps, *, generate_s=0.02, slice_s=0.05, decoding=3):
    """Time of each side while both always have work; of three requests, so many decode and the others wait to."""
    planner = Planner(share)
    spent = dict.fromkeys(Action, 0.0)
    for _ in range(steps):
        action = planner.next(Load(requests=3, decoding=decoding, background=True))
        seconds = slice_s if action is Action.BACKGROUND else generate_s
        planner.charge(action, seconds)
        spent[action] += seconds
    return spent


@given(st.floats(0.05, 0.95), st.floats(0.001, 0.2), st.floats(0.001, 0.2), st.sampled_from([0, 2, 3]))
def test_with_requests_training_gets_its_share_of_the_time(share, generate_s, slice_s, decoding):
    """Whatever single actions cost, the split of time approaches `share`."""
    spent = simulate(share, 4000, generate_s=generate_s, slice_s=slice_s, decoding=decoding)
    total = sum(spent.values())
    # neither side can be further off than one action of the other's length; what newcomers earn comes later
    late = 2 * OVER if 0 < decoding < 3 else 1
    slack = (late * generate_s / (1 - share) + slice_s / share) / total
    assert abs(spent[Action.BACKGROUND] / total - share) <= slack


def test_without_requests_training_gets_everything():
    """An idle service trains without a pause."""
    planner = Planner(0.5)
    for _ in range(5):
        assert planner.next(Load(0, 0, True)) is Action.BACKGROUND
        planner.charge(Action.BACKGROUND, 1.0)


def test_without_training_requests_get_everything_and_nothing_to_do_waits():
    """Each side alone has the whole engine."""
    planner = Planner(0.5)
    for _ in range(5):
        assert planner.next(Load(1, 1, False)) is Action.GENERATE
        planner.charge(Action.GENERATE, 1.0)
    assert planner.next(Load(0, 0, False)) is Action.WAIT


def test_a_request_that_comes_while_it_trains_is_served_at_once():
    """Training alone earns no claim, and the slice it was in is paid back."""
    planner = Planner(0.9)
    for _ in range(100):
        planner.charge(planner.next(Load(0, 0, True)), 0.05)
    assert planner.next(Load(1, 1, True)) is Action.GENERATE


def test_training_that_begins_does_not_collect_for_the_past():
    """Hours of answering before a job do not let it block answers afterwards."""
    planner = Planner(0.5)
    for _ in range(1000):
        planner.charge(planner.next(Load(1, 1, False)), 1.0)
    planner.charge(planner.next(Load(1, 1, True)), 0.02)
    actions = []
    for _ in range(6):
        action = planner.next(Load(1, 1, True))
        planner.charge(action, 0.02)
        actions.append(action)
    assert actions.count(Action.BACKGROUND) == 3


@given(st.floats(0.05, 0.95), st.lists(st.floats(0.001, 0.2), min_size=60, max_size=60))
def test_who_decodes_waits_for_a_slice_or_for_newcomers_never_for_both(share, seconds):
    """With newcomers all the time: after a slice come the next tokens alone, and training has its part even so."""
    planner, actions = Planner(share), []
    for each in seconds:
        actions.append(planner.next(Load(3, 2, True)))
        planner.charge(actions[-1], each)
    for before, after in itertools.pairwise(actions):
        if before is Action.BACKGROUND:
            assert after is not Action.GENERATE
    # what is owed does not grow without end
    owed = 0.0
    for action, each in zip(actions, seconds, strict=True):
        if action is Action.BACKGROUND:
            owed -= each
        else:
            assert owed <= 2 * OVER * max(seconds) * share / (1 - share) + 1e-9
            owed += each * share / (1 - share)


def test_what_long_prompts_have_earned_is_not_taken_from_a_newcomer_in_one_row():
    """Forty passes of a second beside one who decodes; then that one leaves, and somebody comes."""
    planner = Planner(0.5, 0.05)
    for _ in range(400):
        action = planner.next(Load(2, 1, True))
        planner.charge(action, 1.0 if action is Action.GENERATE else 0.05)
    waited = 0.0
    while (action := planner.next(Load(1, 0, True))) is Action.BACKGROUND:
        planner.charge(action, 0.05)
        waited += 0.05
    assert waited <= 0.05 * (OVER + 1)


@given(st.floats(0.05, 0.95), st.floats(0.005, 0.1), st.floats(0.0, 0.03))
def test_what_a_slice_leaves_under_way_is_its_own_time(share, step_s, left_s):
    """The step behind it waits for that, and is not charged for it: the split approaches `share` as if it had ended."""
    planner, spent, left = Planner(share), dict.fromkeys(Action, 0.0), 0.0
    for _ in range(4000):
        action = planner.next(Load(3, 3, True))
        if action is Action.BACKGROUND:
            spent[action] += 0.05
            planner.charge(action, 0.05 - left_s + left, left_s)  # after another slice it ends that one first
            left = left_s
        else:
            spent[action] += step_s
            planner.charge(action, step_s + left)
            left = 0.0
    total = sum(spent.values())
    assert abs(spent[Action.BACKGROUND] / total - share) <= (step_s / (1 - share) + 0.05 / share) / total


def test_newcomers_do_not_wait_for_a_slice_where_nobody_decodes():
    """Their prompts come right after the one that was under way; and with nobody new, steps are for all as ever."""
    planner = Planner(0.5)
    planner.next(Load(0, 0, True))
    planner.charge(Action.BACKGROUND, 0.05)
    assert planner.next(Load(2, 0, True)) is Action.GENERATE
    planner.charge(Action.GENERATE, 0.05)
    planner.charge(planner.next(Load(2, 2, True)), 0.05)
    assert planner.next(Load(2, 2, True)) is Action.GENERATE


def test_a_seat_in_use_is_not_taken():
    """With every seat used, a newcomer waits; a released seat goes to it, the longest unused first."""
    slots, loads = Slots(3), []
    first = slots.acquire("a", loads.append)
    second = slots.acquire("b", loads.append)
    assert {first, second} == {1, 2}
    assert slots.acquire("c", loads.append) is None
    slots.release(second)
    slots.release(first)
    assert slots.acquire("b", loads.append) == second  # still there: not loaded again
    slots.release(second)
    assert slots.acquire("c", loads.append) == first  # "a" was unused for longer
    assert loads == [first, second, first]


def test_users_of_one_adapter_share_its_seat():
    """The seat is free only when the last of them has gone."""
    slots = Slots(2)
    assert slots.acquire("a", lambda slot: None) == slots.acquire("a", lambda slot: None) == 1
    slots.release(1)
    assert slots.acquire("b", lambda slot: None) is None
    slots.release(1)
    assert slots.acquire("b", lambda slot: None) == 1


def test_a_failed_load_leaves_the_seat_empty():
    """An adapter whose files are damaged holds nothing."""
    slots = Slots(2)

    def fail(slot):
        raise ValueError

    for _ in range(2):
        try:
            slots.acquire("a", fail)
        except ValueError:
            continue
        raise AssertionError
    assert slots.find("a") is None
    assert slots.acquire("b", lambda slot: None) == 1


def test_a_forgotten_adapter_keeps_its_users_but_takes_no_new_ones():
    """Its name is loaded again for the next request, into another seat."""
    slots = Slots(3)
    old = slots.acquire("a", lambda slot: None)
    slots.forget("a")
    assert slots.find("a") is None
    assert slots.acquire("a", lambda slot: None) != old
    slots.release(old)
    assert slots.acquire("b", lambda slot: None) == old
