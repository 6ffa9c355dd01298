"""Holding a model to what the base said: the divergence, its rows, and a run with it."""

import itertools
import json
import math

import mlx.core as mx
import numpy as np
import pytest
import tiny

from radiance_mlx.errors import CheckpointDamaged
from radiance_mlx.lora import rehearsal as rehearsing
from radiance_mlx.lora.batches import target_positions
from radiance_mlx.lora.distributions import kl, log_softmax
from radiance_mlx.lora.encoding import Encoded
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.rehearsal import Rehearsal, Source, load_rows, save_rows, sureness, teacher, together
from radiance_mlx.lora.replay import Replay
from radiance_mlx.lora.trainer import Trainer


def divergence(logits, ids, logprobs, tail):
    return kl(ids, logprobs, tail, log_softmax(logits))


@pytest.fixture(scope="module")
def base():
    return tiny.model()


def rehearsed(base, rows, *, full_head=False, names=tiny.ATTENTION, **options):
    """Rows with what the base says to them."""
    tree, out = tiny.tree(base, names), []
    head = None if full_head else install_head(tree.module, tiny.VOCAB)
    tiny.drive(teacher(tree, head, rows, out, **options), together=3)
    return out


@pytest.fixture(scope="module")
def rows(base):
    return rehearsed(base, tiny.examples(9, seed=11))


def make_trainer(base, section, on_step=lambda trainer: None, *, full_head=False, dropout=0.2, **options):
    tree = tiny.tree(base, dropout=dropout, grad_checkpoint=section.grad_checkpoint)
    head = None if full_head else install_head(tree.module, tiny.VOCAB)
    return Trainer(tree, head, tiny.examples(6), section, 1, on_step, **options)


def trained(base, section, *, together=1, **options):
    run = make_trainer(base, section, **options)
    tiny.drive(run.run(), together=together)
    return run


def rehearsal(rows, kl_weight=1.0, count=3):
    return Rehearsal([Source(rows)], kl_weight=kl_weight, rows=count)


def kl_to(run, rows):
    """Mean KL(rows' distributions ‖ the run's weights) over all targets, one row at a time through the full model."""
    module = tiny.alone(tiny.model(), run.tree.adapter())
    total, count = 0.0, 0
    for r in rows:
        logits = module(mx.array([r.row.tokens[:-1]]))[0][r.row.offset - 1 :]
        total += divergence(logits, mx.array(r.ids), mx.array(r.logprobs), mx.array(r.tail)).sum().item()
        count += r.row.targets
    return total / count


# --- the divergence ------------------------------------------------------------------------------


def test_the_divergence_of_three_tokens_is_the_one_computed_by_hand():
    """All three kept: Σ p log(p / q), and no tail."""
    p, q = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
    ids = mx.array([[2, 0, 1]])
    logprobs = mx.log(mx.array([[p[2], p[0], p[1]]]))
    found = divergence(mx.log(mx.array([q])) + 7.0, ids, logprobs, mx.array([-80.0]))
    by_hand = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.6)
    assert found.item() == pytest.approx(by_hand, abs=1e-6)


def test_what_is_not_kept_is_one_more_outcome():
    """One kept of three: the other two count together, neither left out nor scaled away."""
    q = [0.2, 0.2, 0.6]
    found = divergence(mx.log(mx.array([q])), mx.array([[0]]), mx.log(mx.array([[0.5]])), mx.log(mx.array([0.5])))
    by_hand = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    assert found.item() == pytest.approx(by_hand, abs=1e-6)


def test_the_gradient_is_that_of_the_outcomes():
    """With all kept it is q - p; with a tail, the tail's part is shared in proportion to q. None is ever NaN."""
    q = mx.array([[0.2, 0.2, 0.6]])

    def loss(logits, ids, logprobs, tail):
        return divergence(logits, ids, logprobs, tail).sum()

    grad = mx.grad(loss)
    whole = grad(mx.log(q), mx.array([[0, 1, 2]]), mx.log(mx.array([[0.5, 0.3, 0.2]])), mx.array([-80.0]))
    assert mx.allclose(whole, q - mx.array([[0.5, 0.3, 0.2]]), atol=1e-6).item()
    part = grad(mx.log(q), mx.array([[0]]), mx.log(mx.array([[0.5]])), mx.log(mx.array([0.5])))
    assert mx.allclose(part, q - mx.array([[0.5, 0.5 * 0.25, 0.5 * 0.75]]), atol=1e-6).item()
    certain = mx.array([[200.0, 0.0, -200.0, -mx.inf]])
    for ids in ([[0, 1]], [[2, 3]]):
        assert mx.isfinite(grad(certain, mx.array(ids), mx.array([[-1e-7, -16.0]]), mx.array([-80.0]))).all().item()


@pytest.mark.parametrize("top", [1, 5, 64, tiny.VOCAB])
def test_the_base_against_itself_is_zero(base, top):
    """Whatever is kept, with target rows only or with the full head."""
    rows = rehearsed(base, tiny.examples(5), top=top)
    assert abs(kl_to(make_trainer(base, tiny.settings()), rows)) < 1e-5
    assert all(r.ids.shape == (r.row.targets, top) for r in rows)


def test_what_is_kept_bounds_the_divergence_from_below(base):
    """More kept is never a smaller divergence, and all kept is the divergence itself."""
    run = trained(base, tiny.settings(max_steps=3))
    data = tiny.examples(4, seed=3)
    found = [kl_to(run, rehearsed(base, data, top=top)) for top in (1, 8, 64, tiny.VOCAB)]
    assert 0 < found[0] < found[1] < found[2] < found[3]
    learnt = tiny.alone(base, run.tree.adapter())
    exact, count = 0.0, 0
    for e in data:
        p, q = (m(mx.array([e.tokens[:-1]]))[0][e.offset - 1 :] for m in (base, learnt))
        p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (p, q))
        exact, count = exact + (mx.exp(p) * (p - q)).sum().item(), count + e.targets
    assert found[3] == pytest.approx(exact / count, rel=1e-4)


# --- the base's answers --------------------------------------------------------------------------


def test_the_teacher_keeps_the_order_and_needs_no_company(base):
    """Rows come out as they went in, whatever shared a pass with them and whichever head was used."""
    data = [*tiny.examples(5), Encoded((1, 2), 2)]
    together = rehearsed(base, data, together=3 * 64)
    assert [r.row for r in together] == data[:5]
    for one in (rehearsed(base, data, together=1), rehearsed(base, data, full_head=True)):
        for left, right in zip(together, one, strict=True):
            assert np.allclose(np.sort(left.logprobs), np.sort(right.logprobs), atol=1e-4)
            assert np.allclose(left.tail, right.tail, atol=1e-4)


def test_how_sure_the_base_is_of_a_first_token(base):
    """What the teacher finds likeliest there, in the rows' order."""
    data = [Encoded((*row.tokens, 5), len(row.tokens)) for row in tiny.examples(7)]
    tree, out = tiny.tree(base), []
    tiny.drive(sureness(tree, install_head(tree.module, tiny.VOCAB), data, out))
    assert out == pytest.approx([row.logprobs.max() for row in rehearsed(base, data)], abs=1e-5)


def test_the_teacher_can_be_cut(base):
    """At each adapted linear, as in training, and after each step from the logits to what is kept.

    The tree trains on afterwards as if nothing had been.
    """
    tree, out = tiny.tree(base, dropout=0.3), []
    pieces = list(teacher(tree, None, tiny.examples(3), out, together=2 * 32))
    assert len(pieces) == 2 * (3 * 4 + 4)
    assert {len(piece.arrays) for piece in pieces} == {1}
    assert sum(piece.barrier for piece in pieces) == 2 * 4
    assert tree.module.training
    assert tree.tape.outputs == []


def test_rows_survive_a_file(base, rows, tmp_path):
    """Saved and loaded: equal to the last bit, with the facts; an empty set too. What is damaged says so."""
    save_rows(tmp_path, rows, {"source": "self", "count": 9})
    again, facts = load_rows(tmp_path)
    assert facts == {"source": "self", "count": 9}
    for left, right in zip(rows, again, strict=True):
        assert left.row == right.row
        assert all(np.array_equal(getattr(left, n), getattr(right, n)) for n in ("ids", "logprobs", "tail"))
    (tmp_path / "rehearsal.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointDamaged):
        load_rows(tmp_path)
    save_rows(tmp_path, rows[:3], {})
    document = json.loads((tmp_path / "rehearsal.json").read_text())
    document["rows"].pop()
    (tmp_path / "rehearsal.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointDamaged):
        load_rows(tmp_path)
    save_rows(tmp_path, [], {"source": "self"})
    assert load_rows(tmp_path) == ([], {"source": "self"})


# --- the order of rows ---------------------------------------------------------------------------


def drawn(steps, count):
    """The first two tokens of every row, step by step."""
    return [
        [tuple(row[:2]) for (tokens, *_), _ in step for row in np.array(tokens).tolist()]
        for step in itertools.islice(steps, count)
    ]


def test_every_step_rehearses_so_many_rows_in_an_order_of_its_own(rows):
    """All rows in every epoch; seed and number decide; a later start goes on with the very rows."""
    options = {"batch_size": 2, "max_tokens": 64}
    once = drawn(rehearsal(rows).steps(seed=(0, 1), **options), 12)
    assert all(len(step) == 3 for step in once)
    assert len({row for step in once[:3] for row in step}) == 9
    assert drawn(rehearsal(rows).steps(seed=(0, 1), start=5, **options), 7) == once[5:]
    assert drawn(rehearsal(rows).steps(seed=(0, 2), **options), 12) != once


def test_sources_come_by_their_shares(rows):
    """Three steps of one for every step of the other; a source without rows leaves its share to the rest."""
    sources = [Source(rows[:4], 3.0), Source(rows[4:], 1.0), Source([], 5.0)]
    steps = Rehearsal(sources, kl_weight=1.0, rows=4).steps(batch_size=8, max_tokens=64, seed=(0, 1))
    first = {tuple(r.row.tokens[:2]) for r in rows[:4]}
    assert sorted(sum(row in first for row in step) for step in drawn(steps, 40)) == [0] * 10 + [4] * 30


def test_of_each_row_a_stretch_comes_at_a_time(base, rows):
    """All of its targets by and by, with what the base said to them; in the same order whenever it begins."""
    made = Rehearsal([Source(rows)], kl_weight=1.0, rows=3, row_targets=2)
    options = {"batch_size": 2, "max_tokens": 64, "seed": (0, 1)}
    seen = set()
    for step in itertools.islice(made.steps(**options), 400):
        for (tokens, spans, ids, logprobs, tail, of), _ in step:
            positions, targets = target_positions((tokens, spans))
            assert of == sum(len(batch[4]) for batch, _ in step) <= 6
            starts = np.array(tokens)[positions // (tokens.shape[1] - 1), :2]
            for start, place, target, *said in zip(
                starts.tolist(), positions, targets, ids, logprobs, tail, strict=True
            ):
                [row] = [r for r in rows if list(r.row.tokens[:2]) == start]
                at = int(place) % (tokens.shape[1] - 1) + 1
                assert row.row.tokens[at] == target
                number = at - (len(row.row.tokens) - row.row.targets)
                assert all(
                    np.array_equal(a, b[number]) for a, b in zip(said, (row.ids, row.logprobs, row.tail), strict=True)
                )
                seen.add((*start, at))
    assert len(seen) == sum(r.row.targets for r in rows)
    later = itertools.islice(made.steps(start=7, **options), 5)
    for one, other in zip(later, itertools.islice(made.steps(**options), 7, 12), strict=True):
        assert [a[0].tolist() for a, _ in one] == [b[0].tolist() for b, _ in other]


def test_rows_of_another_length_do_not_widen_a_micro_batch(base):
    """A long row is a micro-batch of its own: it does not make the short ones twice as wide."""
    long = Encoded(tuple(tiny.prompts(60)[0]), 2)
    rows = rehearsed(base, [*tiny.examples(7, longest=30), long])
    step = next(rehearsal(rows, count=8).steps(batch_size=8, max_tokens=64, seed=(0, 1)))
    assert [tokens.shape[0] for (tokens, *_), _ in step] == [7, 1]
    assert step[0][0][0].shape[1] <= 32
    assert {of for (*_, of), _ in step} == {sum(r.row.targets for r in rows)}


# --- a run with rehearsal ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no weight", "no rows in a step", "no rows", "rows that are too long"])
def test_with_nothing_to_rehearse_the_run_is_the_plain_one(base, rows, kind):
    """Equal to the last bit: losses, weights, optimizer."""
    section = tiny.settings(max_seq_length=60)
    made = {
        "no weight": rehearsal(rows, 0.0),
        "no rows in a step": rehearsal(rows, count=0),
        "no rows": rehearsal([]),
        "rows that are too long": rehearsal(rehearsed(base, [Encoded(tuple(tiny.prompts(70)[0]), 2)])),
    }[kind]
    plain, empty = trained(base, section), trained(base, section, rehearsal=made, replay=Replay([], 0.5))
    assert plain.history.as_dict() == empty.history.as_dict()
    assert tiny.equal(plain.tree.parameters(), empty.tree.parameters())
    assert tiny.equal(plain.state()[1], empty.state()[1])


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_slices_change_nothing(base, rows, grad_checkpoint):
    """One piece at a time, seven at a time, or all that may be: equal to the last bit."""
    section = tiny.settings(grad_checkpoint=grad_checkpoint, clip_norm=1.0, eval_every=2)
    whole = trained(base, section, together=10**6, rehearsal=rehearsal(rows))
    for pieces in (1, 7):
        run = trained(base, section, together=pieces, rehearsal=rehearsal(rows))
        assert run.history.as_dict() == whole.history.as_dict()
        assert tiny.equal(run.tree.parameters(), whole.tree.parameters())


def gradients(run, steps):
    """(mean divergence, gradients) of the first of `steps`."""
    row, grads = {}, {name: mx.zeros(value.shape) for name, value in run.tree.parameters().items()}
    tiny.drive(run._rehearsal_pieces(next(steps), 0, grads, row))
    return row["kl"], grads


def test_short_rows_share_a_micro_batch_whatever_its_size(base):
    """A pass over the weights for each would cost more; long ones are not more than there may be."""
    rows = rehearsed(base, tiny.examples(12, longest=30))
    [(whole, _)] = next(rehearsal(rows, count=12).steps(batch_size=1, max_tokens=64, seed=(0, 1)))
    assert whole[0].shape[0] == 12
    assert [together(length, 2) for length in (17, 129, 200, 257, 400, 10_000)] == [32, 4, 2, 2, 2, 2]


def test_micro_batches_add_up_to_one(base, rows, monkeypatch):
    """Rehearsed one row at a time, all together, or with the full head: the same divergence and gradients."""
    made = rehearsal(rows, 2.0, count=9)
    run = trained(base, tiny.settings(), dropout=0.0, rehearsal=made)
    full = make_trainer(base, tiny.settings(), dropout=0.0, rehearsal=made, full_head=True)
    full.tree.load(run.tree.parameters())
    kl, expected = gradients(run, made.steps(batch_size=9, max_tokens=64, seed=(0, 1)))
    monkeypatch.setattr(rehearsing, "REHEARSED_TOGETHER", 0)
    assert kl == pytest.approx(kl_to(run, rows), rel=1e-4)
    for other, size in ((run, 1), (run, 4), (full, 9)):
        found, grads = gradients(other, made.steps(batch_size=size, max_tokens=64, seed=(0, 1)))
        assert found == pytest.approx(kl, rel=1e-4)
        assert tiny.furthest(grads, expected) < 1e-4


def test_the_divergence_is_in_the_history(base, rows):
    """`kl` is the unweighted mean of the step's rows, 0 before anything is learnt; `loss` stays what it is."""
    run = trained(base, tiny.settings(), dropout=0.0, rehearsal=rehearsal(rows, 2.0))
    plain = trained(base, tiny.settings(), dropout=0.0)
    first, second, _ = run.history.steps
    assert abs(first["kl"]) < 1e-5
    assert first["loss"] == plain.history.steps[0]["loss"]
    assert second["kl"] > 1e-3
    assert run.trained_tokens > plain.trained_tokens


def test_rehearsal_keeps_the_model_near_the_base(base, rows):
    """With it, what was rehearsed has changed far less than without, and the lesson is learnt all the same."""
    section = tiny.settings(max_steps=30, lr=3e-3)
    plain = trained(base, section, dropout=0.0)
    held = trained(base, section, dropout=0.0, rehearsal=rehearsal(rows, 3.0, count=6))
    assert kl_to(held, rows) < 0.3 * kl_to(plain, rows)
    assert tiny.losses(held)[-1] < 0.6 * tiny.losses(held)[0]


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_is_the_uninterrupted_one(base, rows, step):
    """With replay and rehearsal: losses, divergences, weights and optimizer agree to the last bit."""
    states, section = {}, tiny.settings(max_steps=5)
    options = {"replay": Replay(tiny.examples(7, seed=5), 0.5), "rehearsal": rehearsal(rows, 2.0)}

    def keep(run):
        weights, optimizer, progress = run.state()
        states[run.step] = weights, optimizer, json.loads(json.dumps(progress))

    whole = make_trainer(base, section, keep, **options)
    tiny.drive(whole.run())
    mx.random.seed(99)
    resumed = make_trainer(base, section, **options)
    resumed.resume(*states[step])
    tiny.drive(resumed.run(), together=5)
    assert resumed.history.as_dict() == whole.history.as_dict()
    assert resumed.trained_tokens == whole.trained_tokens
    assert tiny.equal(resumed.tree.parameters(), whole.tree.parameters())
    assert tiny.equal(resumed.state()[1], whole.state()[1])
