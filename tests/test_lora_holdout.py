"""Held-out rows: which they are, that they are only measured at first, learnt later, and when their loss says stop."""

import itertools
import json
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
import tiny

from radiance_mlx.errors import NonFinite, TrainingFailed
from radiance_mlx.lora import files, memory
from radiance_mlx.lora.encoding import Encoded
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.holdout import Holdout, held_out, since_lowest
from radiance_mlx.lora.rehearsal import Rehearsal, Source, teacher
from radiance_mlx.lora.replay import Replay
from radiance_mlx.lora.targets import find_targets
from radiance_mlx.lora.trainer import Trainer

#: random pairs: what is learnt of some makes the others worse, so that the held-out loss soon rises
DATA = tiny.examples(8)
EARLIER = tiny.examples(5, seed=7)


@pytest.fixture(scope="module")
def base():
    return tiny.model()


@pytest.fixture(scope="module")
def rehearsed(base):
    tree, rows = tiny.tree(base), []
    tiny.drive(teacher(tree, install_head(tree.module, tiny.VOCAB), tiny.examples(5, seed=11), rows))
    return rows


def settings(**changes):
    return tiny.settings(**{"eval_fraction": 0.25, "eval_every": 2, "max_steps": 8, **changes})


def make_trainer(base, section, data=DATA, on_step=lambda trainer: None, *, dropout=0.2, **options):
    tree = tiny.tree(base, dropout=dropout)
    return Trainer(tree, install_head(tree.module, tiny.VOCAB), data, section, 1, on_step, **options)


def trained(base, section, data=DATA, *, together=1, **options):
    run = make_trainer(base, section, data, **options)
    tiny.drive(run.run(), together=together)
    return run


def phase_of(run):
    return 1 if run.holdout.second_from is None else 2


def with_other_held_rows(run):
    """The run's examples, the held-out ones replaced by others of the same lengths."""
    rng = np.random.default_rng(5)
    held = {e.tokens for e in run.holdout.held}
    return [
        Encoded(tuple(rng.integers(3, tiny.VOCAB, len(e.tokens)).tolist()), e.offset) if e.tokens in held else e
        for e in run.examples
    ]


def losses_of(run):
    return [row["loss"] for row in run.history.evals]


# --- which rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "fraction", "out"), [(8, 0.25, 2), (8, 0.01, 1), (2, 0.9, 1), (3, 0.99, 2), (1, 0.5, 0), (8, 0.0, 0)]
)
def test_about_the_fraction_is_held_out_and_never_all(count, fraction, out):
    """At least one row is held out and at least one is left; of a single one none is."""
    places = held_out(tiny.examples(count), range(count), fraction, (0, 1))
    assert len(places) == out
    assert places == sorted(set(places))


def test_what_is_held_out_hangs_on_seed_and_number_alone():
    """Not on the rows' content, nor on numbers drawn elsewhere; over batches every row has its turn."""
    once = held_out(tiny.examples(20), range(20), 0.2, (0, 1))
    np.random.seed(4)
    assert held_out(tiny.examples(20, seed=9), range(20), 0.2, (0, 1)) == once
    drawn = [tuple(held_out(tiny.examples(20), range(20), 0.2, (0, number))) for number in range(60)]
    assert len(set(drawn)) > 50
    assert {place for places in drawn for place in places} == set(range(20))
    assert held_out(tiny.examples(20), range(20), 0.2, (1, 1)) != once


def test_rows_of_one_original_are_held_out_together():
    """Rewordings go with their original, and copies with what they are copies of: nothing is measured that is learnt.

    Four originals; each has two rewordings, and a rewording of the first is the second itself.
    """
    rows = tiny.examples(12)
    rows[4] = rows[1]
    origins = [0, 1, 2, 3, *(i // 2 for i in range(8))]
    sizes = set()
    for number in range(30):
        out = set(held_out(rows, origins, 0.34, (0, number)))
        sizes.add(len(out))
        taken = {origins[place] for place in out}
        assert out == {place for place in range(12) if origins[place] in taken}
        assert (0 in taken) == (1 in taken)
    assert sizes == {3, 6}


def test_a_batch_of_copies_holds_nothing_out_and_says_so(base):
    """It trains as without the setting, and is as patient."""
    run = trained(base, settings(lr=0.5, patience=1, eval_every=1), [DATA[0]] * 3)
    assert run.holdout.held == []
    assert "nothing was held out" in run.holdout.note
    plain = trained(base, settings(lr=0.5, eval_fraction=0.0, eval_every=1), [DATA[0]] * 3)
    losses = losses_of(plain)
    assert any(later >= sooner for sooner, later in itertools.pairwise(losses))
    assert run.history.as_dict() == plain.history.as_dict()
    assert tiny.equal(run.tree.parameters(), plain.tree.parameters())
    assert plain.holdout.note == trained(base, settings(max_steps=2)).holdout.note == ""


# --- two phases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", [None, Replay(EARLIER, 0.4)])
def test_held_out_rows_are_not_trained_in_the_first_phase_and_are_in_the_second(base, replay):
    """Whatever is in them, the first phase ends with the same weights; it measures what is in them. Then they count."""
    ends = []

    def keep(run):
        if run.step == run.holdout.first_steps:
            ends.append((run.tree.parameters(), tiny.losses(run)))

    one = trained(base, settings(), on_step=keep, replay=replay)
    other = trained(base, settings(), with_other_held_rows(one), on_step=keep, replay=replay)
    assert len(one.holdout.held) == 2
    assert one.holdout.held != other.holdout.held
    assert tiny.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert [row["step"] for row in one.history.evals] == [2, 4, 6]
    assert all(a != b for a, b in zip(losses_of(one), losses_of(other), strict=True))
    assert not tiny.equal(one.tree.parameters(), other.tree.parameters())


def test_the_second_phase_teaches_what_was_held_out(base):
    """The held-out loss at the end of the first phase is the run's; after the second it is far below."""
    run = trained(base, settings(max_steps=40, lr=3e-3, eval_fraction=0.5), dropout=0.0)
    after = []
    tiny.drive(run.evaluate(run.holdout.held, after))
    assert run.held_out_loss == losses_of(run)[-1]
    assert after[0] < 0.5 * run.held_out_loss
    assert run.learnt == run.examples
    assert [row["step"] for row in run.history.steps] == list(range(1, 41))
    assert (run.step, run.total_steps, run.eta_s) == (40, 40, 0.0)


def test_rows_that_stay_out_are_never_trained(base):
    """With `eval_holdout` all steps are the first phase's, and what is in the held-out rows changes nothing."""
    section = settings(eval_holdout=True)
    one = trained(base, section)
    other = trained(base, section, with_other_held_rows(one))
    assert tiny.equal(one.tree.parameters(), other.tree.parameters())
    assert one.holdout.first_steps == one.step == 8
    assert [row["step"] for row in one.history.evals] == [2, 4, 6, 8]
    assert one.learnt == one.holdout.trained
    assert sorted(one.examples.index(e) for e in one.holdout.held) == one.holdout.never_trained
    over_the_trained = [], []
    for run, out in zip((one, other), over_the_trained, strict=True):
        tiny.drive(run.evaluate_all(out))
    assert over_the_trained[0] == over_the_trained[1]


def first_tokens(batches):
    return [int(row[0]) for tokens, _ in batches for row in np.array(tokens)]


@pytest.mark.parametrize(("fraction", "share"), [(0.0, 4), (0.5, 2)])
def test_half_of_a_steps_new_rows_are_held_out_ones(fraction, share):
    """Of eight rows: four of each kind; with replay at a half, two of each and four earlier ones."""
    rows = [Encoded((100 + i, *range(2, 6 + i % 5)), 3) for i in range(20)]
    earlier = [Encoded((500 + i, *range(2, 8)), 3) for i in range(30)]
    holdout = Holdout(rows, range(20), settings(), 1)
    stream = holdout.second_stream(Replay(earlier, fraction), batch_size=4, accumulate=2, max_tokens=64)
    held = {e.tokens[0] for e in holdout.held}
    seen = Counter()
    for _ in range(10):
        step = first_tokens(itertools.islice(stream, 2))
        kinds = Counter("held" if t in held else "earlier" if t >= 500 else "other" for t in step)
        assert kinds == Counter(held=share, other=share, earlier=8 - 2 * share)
        seen.update(t for t in step if t in held)
    assert set(seen) == held
    assert max(seen.values()) - min(seen.values()) <= 1


def test_what_is_replayed_is_no_held_out_row_either(base):
    """A text that was taught before and is held out now is not replayed while it is measured."""
    held = make_trainer(base, settings()).holdout.held
    run = make_trainer(base, settings(), replay=Replay([*held, *EARLIER], 0.5))
    drawn = [row.tolist() for tokens, _ in itertools.islice(run.micro_batches(), 40) for row in tokens]
    for e in held:
        assert not any(row[: len(e.tokens)] == list(e.tokens) for row in drawn)
    assert run.replay.examples[: len(held)] == held


@pytest.mark.parametrize(
    ("steps", "fraction", "first", "ended", "second"),
    [
        (60, 0.1, 54, 54, 6),
        (60, 0.1, 54, 27, 3),
        (60, 0.1, 54, 28, 4),
        (60, 0.1, 54, 1, 1),
        (2, 0.01, 1, 1, 1),
        (3, 0.9, 1, 1, 2),
        (7, 0.5, 4, 4, 3),
        (7, 0.5, 4, 3, 3),
        (10, 0.75, 2, 2, 8),
        (6, 0.4, 4, 3, 2),
    ],
)
def test_the_second_phase_has_its_part_of_the_steps(steps, fraction, first, ended, second):
    """`eval_fraction` of them; after an early end in proportion to those that there were."""
    holdout = Holdout(DATA, range(8), settings(max_steps=steps, eval_fraction=fraction), 1)
    assert holdout.first_steps == first
    assert holdout.total_steps == steps
    holdout.second_from = ended
    assert holdout.second_steps == second
    assert holdout.total_steps == ended + second <= steps


def test_the_end_of_the_first_phase_is_measured_once(base):
    """With no evaluation on the way too, and not twice where one is due."""
    assert [row["step"] for row in trained(base, settings(eval_every=0)).history.evals] == [6]
    assert [row["step"] for row in trained(base, settings(eval_every=4)).history.evals] == [4, 6]
    assert [row["step"] for row in trained(base, settings(eval_every=3)).history.evals] == [3, 6]


def test_slices_change_nothing(base):
    """The same run to the last bit, however many pieces go together."""
    section = settings(patience=2, max_steps=12)
    once, again = trained(base, section), trained(base, section, together=9)
    assert once.history.as_dict() == again.history.as_dict()
    assert tiny.equal(once.tree.parameters(), again.tree.parameters())


def test_a_held_out_loss_that_is_no_number_ends_the_run(base):
    """It could neither be compared nor published, also where no step comes after it."""
    with pytest.raises(NonFinite):
        trained(base, settings(lr=1e30, max_steps=1, eval_holdout=True))


# --- stopping ------------------------------------------------------------------------------------


def test_since_lowest_counts_from_the_first_of_equals():
    """A loss that only comes again is no improvement."""
    assert [since_lowest(losses) for losses in ([3.0], [3.0, 2.0], [2.0, 3.0, 2.0], [1.0, 3.0, 2.0, 1.5])] == [
        0,
        0,
        2,
        3,
    ]


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_stops_and_goes_back_to_the_best(base, patience):
    """After so many evaluations without improvement; weights and optimizer are those of the lowest loss."""
    states = {}
    section = settings(patience=patience, eval_every=1, max_steps=40, lr=2e-2, eval_holdout=True)
    run = trained(base, section, on_step=lambda t: states.update({t.step: t.state()}))
    losses = losses_of(run)
    best = losses.index(min(losses)) + 1
    assert run.step == best + patience < 40
    assert run.finished_early.startswith(
        f"stopped at step {run.step}: the held-out loss has not improved for {patience} ev"
    )
    assert tiny.equal(run.tree.parameters(), states[best][0])
    assert tiny.equal(run.state()[1], states[best][1])
    assert not tiny.equal(run.tree.parameters(), states[run.step][0])
    assert run.held_out_loss == min(losses) < losses[-1]
    measured = []
    tiny.drive(run.evaluate(run.holdout.held, measured))
    assert measured == [run.held_out_loss]


def test_after_an_early_stop_the_second_phase_begins_at_the_best(base):
    """Its steps are fewer in proportion, progress says so, and one step from the best weights is what comes first."""
    section = settings(patience=2, eval_every=1, max_steps=40, lr=2e-2)
    seen, firsts = [], []

    def watch(run):
        seen.append((run.step, run.total_steps, phase_of(run)))
        if phase_of(run) == 2 and not firsts:
            firsts.append(run.tree.parameters())

    run = trained(base, section, on_step=watch)
    stopped = max(step for step, _, phase in seen if phase == 1)
    further = -(-stopped * 1 // 3)
    assert [step for step, _, _ in seen] == list(range(1, stopped + further + 1))
    assert seen[stopped - 1][1:] == (40, 1)
    assert {total for _, total, phase in seen if phase == 2} == {run.step} == {stopped + further}
    assert f"stopped at step {stopped}:" in run.finished_early
    assert run.finished_early.endswith(f"the held-out rows: {further}")
    assert run.eta_s == 0.0

    alone = trained(base, section.model_copy(update={"eval_holdout": True}))
    assert alone.step == stopped
    alone.holdout.second_from = stopped
    one_step = alone._second_phase(stopped, itertools.repeat([]))
    while alone.step == stopped:
        mx.eval(next(one_step).arrays)
    mx.eval(next(one_step).arrays)
    assert tiny.equal(alone.tree.parameters(), firsts[0])


def test_patience_that_lasts_changes_nothing(base):
    """A first phase that never runs out of it ends with its last weights, not with its best."""
    plain, patient = trained(base, settings()), trained(base, settings(patience=100))
    assert plain.history.as_dict() == patient.history.as_dict()
    assert tiny.equal(plain.tree.parameters(), patient.tree.parameters())
    assert patient.finished_early == ""


def test_stop_loss_leads_to_the_second_phase(base):
    """The first ends after the first step below it; the held-out rows still get their steps, whatever their loss."""
    full = tiny.losses(trained(base, settings(max_steps=24)))
    limit = min(full[:9]) + 1e-6
    run = trained(base, settings(max_steps=24, stop_loss=limit))
    stopped = next(i for i, loss in enumerate(full, 1) if loss < limit)
    assert run.holdout.second_from == stopped < 18
    assert run.step == stopped + -(-stopped // 3)
    assert f"stopped at step {stopped}: the loss is below stop_loss" in run.finished_early
    assert run.history.evals[-1]["step"] == stopped


# --- going on ------------------------------------------------------------------------------------

RUNS = {
    "two phases": {},
    "stays out": {"eval_holdout": True},
    "patience": {"patience": 2, "eval_every": 1, "max_steps": 20, "lr": 2e-2},
    "patience, stays out": {"patience": 2, "eval_every": 1, "max_steps": 20, "lr": 2e-2, "eval_holdout": True},
    "adamw, schedule": {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 2},
}


def kept(run, folder):
    """The state through files, as it is after a crash; every array is copied now."""
    weights, optimizer, progress = run.state()
    for name, arrays in (("weights", weights), ("optimizer", optimizer), ("best", run.best_arrays())):
        files.save_arrays(folder / f"{name}.safetensors", arrays)
    loaded = [files.load_arrays(folder / f"{name}.safetensors") for name in ("weights", "optimizer", "best")]
    return loaded[0], loaded[1], json.loads(json.dumps(progress)), loaded[2]


def within_an_evaluation(section, progress):
    """Whether one was due at this step and had not been made."""
    step, evals = progress["step"], progress["history"]["evals"]
    due = step > 0 and step % section.eval_every == 0 and progress["second_from"] is None
    return due and (not evals or evals[-1]["step"] < step)


def well_spread(section, states):
    """About six: three of the first phase and one of its evaluations, two of the second phase if there is one."""
    first = [state for state in states if state[2]["second_from"] is None]
    second = [state for state in states if state[2]["second_from"] is not None]
    evaluations = [state for state in states if within_an_evaluation(section, state[2])]
    of_the_first = [first[0], first[len(first) // 2], first[-1]]
    return [*of_the_first, evaluations[len(evaluations) // 2], *(second and [second[0], second[-1]])]


@pytest.mark.parametrize("lasting", [False, True], ids=["", "replay and rehearsal"])
@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(base, rehearsed, tmp_path, changes, lasting):
    """Taken out anywhere, within a step or an evaluation too, in either phase: the rest is the same to the last bit."""
    section, options = settings(**changes), {}
    if lasting:
        options = {"replay": Replay(EARLIER, 0.3), "rehearsal": Rehearsal([Source(rehearsed)], kl_weight=1.0, rows=2)}
    whole, states = make_trainer(base, section, **options), []
    for number, piece in enumerate(whole.run()):
        mx.eval(piece.arrays)
        if number % 97 == 50 or (piece.barrier and len(piece.arrays) == 1 and number % 3 == 0):
            states.append(kept(whole, tmp_path))
    states = well_spread(section, states)
    assert {progress["second_from"] for _, _, progress, _ in states} == {None, whole.holdout.second_from}
    for state in states:
        resumed = make_trainer(base, section, **options)
        resumed.resume(*state)
        tiny.drive(resumed.run(), together=5)
        assert resumed.history.as_dict() == whole.history.as_dict()
        assert resumed.trained_tokens == whole.trained_tokens
        assert (resumed.finished_early, resumed.held_out_loss) == (whole.finished_early, whole.held_out_loss)
        assert tiny.equal(resumed.tree.parameters(), whole.tree.parameters())
        assert tiny.equal(resumed.state()[1], whole.state()[1])


def test_a_state_without_its_best_weights_is_refused(base):
    """The run could not go back to them."""
    states = []
    trained(base, settings(patience=5), on_step=lambda t: states.append((t.state(), t.best_arrays())))
    state, best = states[2]
    assert best
    with pytest.raises(TrainingFailed, match="best"):
        make_trainer(base, settings(patience=5)).resume(*state)
    make_trainer(base, settings(patience=5)).resume(*state, best)
    assert states[-1][1] == {}  # in the second phase nothing goes back any more


def test_the_best_weights_are_in_the_estimate(base):
    """Patience keeps weights and optimizer a second time; without it nothing is kept."""
    needed = [
        memory.estimate(
            base,
            find_targets(base, tiny.ATTENTION),
            DATA,
            settings(patience=patience),
            rank=4,
            vocab_size=tiny.VOCAB,
            bank_bytes=0,
            head=None,
        )
        for patience in (0, 1)
    ]
    kept_arrays = trained(base, settings(patience=100, eval_holdout=True)).best_arrays()
    assert trained(base, settings(eval_holdout=True)).best_arrays() == {}
    more = needed[1].total - needed[0].total
    assert more == pytest.approx(sum(value.nbytes for value in kept_arrays.values()), abs=64)
