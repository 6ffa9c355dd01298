"""Training in pieces: where a step is cut changes nothing, and each setting does what it says."""

import copy
import math

import mlx.core as mx
import mlx.optimizers as optim
import pytest
import tiny
from mlx.utils import tree_flatten, tree_unflatten

from radiance_mlx.errors import NonFinite, TrainingFailed
from radiance_mlx.lora.batches import batch_stream
from radiance_mlx.lora.encoding import Encoded
from radiance_mlx.lora.optimizer import learning_rate
from radiance_mlx.lora.step import LossFunction, MicroBatch, MicroBatchResult


@pytest.fixture(scope="module")
def base():
    return tiny.model()


@pytest.fixture(scope="module")
def data():
    return tiny.examples(6)


def trained(base, data, section, *, together=1, between=None, **options):
    run = tiny.trainer(base, data, section, **options)
    tiny.drive(run.run(), together=together, between=between)
    return run


def batches_of(run):
    """The micro-batches that `run` would take."""
    seed = (run.settings.seed, run.number)
    return batch_stream(run.examples, batch_size=run.args.batch_size, max_tokens=2048, seed=seed)


def assert_same(left, right):
    """Losses, rates, norms and weights to the last bit."""
    assert left.history.as_dict() == right.history.as_dict()
    assert tiny.equal(left.tree.parameters(), right.tree.parameters())


def some_decoding(base):
    """What the engine does between two pieces: draws tokens, random numbers too."""
    serving = copy.deepcopy(base)

    def between():
        mx.eval(serving(mx.array([[1, 2, 3]])), mx.random.normal((3,)))

    return between


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_slices_change_nothing(base, data, dropout, grad_checkpoint):
    """One piece at a time with decoding in between, seven at a time, or whole steps: equal to the last bit."""
    section = tiny.settings(grad_checkpoint=grad_checkpoint, clip_norm=1.0, eval_every=2)
    whole = trained(base, data, section, dropout=dropout, together=10**6)
    assert_same(trained(base, data, section, dropout=dropout, between=some_decoding(base)), whole)
    assert_same(trained(base, data, section, dropout=dropout, together=7), whole)
    assert len(set(tiny.losses(whole))) == 3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_grad_checkpoint_changes_nothing(base, data, dropout):
    """Layers computed twice see the same dropout: losses and weights are those of the plain run."""
    plain = trained(base, data, tiny.settings(), dropout=dropout, narrow=False)
    checkpointed = trained(base, data, tiny.settings(grad_checkpoint=True), dropout=dropout)
    assert tiny.losses(checkpointed) == tiny.losses(plain)
    assert tiny.furthest(checkpointed.tree.parameters(), plain.tree.parameters()) < 1e-6


def test_dropout_is_drawn_anew_in_each_step(base):
    """The mask hangs on seed, batch, step and micro-batch: with the same rows and no learning, losses differ."""
    run = trained(base, tiny.examples(1), tiny.settings(lr=1e-12, max_steps=3), dropout=0.5, seed=9)
    start = tiny.losses(run)
    assert len(set(start)) == 1  # b is zero: nothing to drop yet
    run = tiny.trainer(base, tiny.examples(1), tiny.settings(lr=1e-12, max_steps=3), dropout=0.5)
    run.tree.load({name: value + 0.1 for name, value in run.tree.parameters().items()})
    tiny.drive(run.run())
    assert len(set(tiny.losses(run))) == 3


def test_dropout_keeps_the_mean(base):
    """What is kept is scaled up by what was dropped."""
    linear = dict(tiny.tree(base, dropout=0.25).module.named_modules())["model.layers.0.self_attn.q_proj"]
    dropped = linear._dropped(mx.ones((400, 32)))
    assert sorted(set(dropped.reshape(-1).tolist())) == pytest.approx([0.0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)


def test_the_module_keeps_its_own_parameters_while_a_step_is_under_way(base, data):
    """The live weights can be read between two pieces: nothing unevaluated hangs on them."""
    for grad_checkpoint in (False, True):
        run = tiny.trainer(base, data, tiny.settings(grad_checkpoint=grad_checkpoint))
        before = run.tree.parameters()
        next(run.run())
        after = run.tree.parameters()
        assert all(after[name] is before[name] for name in before)


def test_pieces_are_as_many_as_there_are_places_to_cut(base, data):
    """Each adapted linear gives a piece forward and one backward; under checkpointing each layer does.

    Between them come those of the loss: one for the only chunk of its logits, and one for itself.
    """
    for grad_checkpoint, places in ((False, 3 * 4), (True, 3)):
        section = tiny.settings(grad_checkpoint=grad_checkpoint, batch_size=1, grad_accum=1, max_steps=1)
        run = tiny.trainer(base, data, section)
        assert sum(1 for _ in run.run()) == places + 2 + places + 2


def test_the_backward_pieces_come_last_layer_first(base, data):
    """Gradients are asked for in reversed call order, so that each piece is a little more work than the last."""
    for grad_checkpoint in (False, True):
        tree = tiny.tree(base, grad_checkpoint=grad_checkpoint)
        result = MicroBatchResult()
        run = tiny.trainer(base, data, tiny.settings())
        batch = next(batches_of(run))
        pieces = list(MicroBatch(tree, LossFunction(tree, None)).pieces(batch, mx.random.key(0), result))
        names = {id(grad): name for name, grad in result.grads.items()}
        backward = [names[id(p.arrays[0])] for p in pieces if id(p.arrays[0]) in names]
        layers = [int(name.split(".layers.")[1].split(".")[0]) for name in backward]
        assert layers == sorted(layers, reverse=True)
        assert set(layers) == {0, 1, 2}


def test_gradients_accumulate_to_their_mean(base):
    """Two micro-batches of one row give the step of one micro-batch of two rows of equal weight."""
    rows = [Encoded(tuple(prompt), 10) for prompt in tiny.prompts(20, 20)]
    one = trained(base, rows, tiny.settings(batch_size=2, grad_accum=1))
    two = trained(base, rows, tiny.settings(batch_size=1, grad_accum=2))
    assert tiny.losses(two) == pytest.approx(tiny.losses(one), rel=1e-5)
    assert tiny.furthest(one.tree.parameters(), two.tree.parameters()) < 1e-4


def first_gradients(base, data, section):
    """A trainer as it starts, and the mean gradient of its first step with that gradient's norm."""
    run = tiny.trainer(base, data, section, full_head=True)
    grads = None
    batches = batches_of(run)
    for _ in range(run.args.grad_accumulation_steps):
        result = MicroBatchResult()
        for piece in MicroBatch(run.tree, LossFunction(run.tree, None)).pieces(next(batches), mx.random.key(0), result):
            mx.eval(piece.arrays)
        grads = result.grads if grads is None else {k: grads[k] + g for k, g in result.grads.items()}
    grads = {k: g / run.args.grad_accumulation_steps for k, g in grads.items()}
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    return run, grads, norm


@pytest.mark.parametrize("clip_norm", [None, 1e-3, 1e3])
def test_clipping_bounds_the_norm_of_the_whole_gradient(base, data, clip_norm):
    """The recorded norm is that before clipping; the update is made with the clipped gradient, or as it is."""
    section = tiny.settings(max_steps=1, clip_norm=clip_norm)
    run, grads, norm = first_gradients(base, data, section)
    assert 1e-3 < norm < 1e3
    if clip_norm == 1e-3:
        grads = {name: grad * (clip_norm / norm) for name, grad in grads.items()}
    adam = optim.Adam(learning_rate=section.lr)
    adam.update(run.tree.module, tree_unflatten(list(grads.items())))

    ours = trained(base, data, section, full_head=True)
    assert ours.history.steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert tiny.furthest(ours.tree.parameters(), run.tree.parameters()) < 1e-6
    first_moment = {k: v for k, v in ours.state()[1].items() if k.endswith(".m")}
    kept = math.sqrt(sum(float((m * m).sum()) for m in first_moment.values())) / 0.1
    assert kept == pytest.approx(min(norm, clip_norm or norm), rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_rate_follows_its_schedule(base, data, schedule, rates):
    """Warm-up, then the schedule down to its end; what is recorded is what the optimizer used."""
    section = tiny.settings(schedule=schedule, warmup_steps=2, max_steps=6, lr=1e-3)
    assert [learning_rate(step, section) for step in range(6)] == pytest.approx([r * 1e-3 for r in rates], rel=1e-4)
    used = []
    run = tiny.trainer(base, data, section, on_step=lambda t: used.append(t.optimizer.learning_rate.item()))
    tiny.drive(run.run())
    assert used == pytest.approx([r * 1e-3 for r in rates], rel=1e-4)
    assert [row["lr"] for row in run.history.steps] == pytest.approx(used, rel=1e-5)


def test_adamw_decays_weights(base, data):
    """The decay takes rate times `weight_decay` off each weight, beside the update by the gradient."""
    decayed = trained(base, data, tiny.settings(optimizer="adamw", weight_decay=5.0, max_steps=1))
    plain = trained(base, data, tiny.settings(optimizer="adamw", max_steps=1))
    start = tiny.tree(base).parameters()
    for name, weight in plain.tree.parameters().items():
        expected = weight - tiny.settings().lr * 5.0 * start[name]
        assert mx.allclose(decayed.tree.parameters()[name], expected, atol=1e-6).item()


def test_training_learns(base, data):
    """The loss falls far below where it began, and evaluation says so too."""
    run = trained(base, data, tiny.settings(max_steps=30, lr=3e-3), names=["all-linear"])
    out = []
    tiny.drive(run.evaluate_all(out))
    assert tiny.losses(run)[0] > 4
    assert out[0] < 0.5 * tiny.losses(run)[0]


def test_evaluation_is_the_token_mean_without_dropout(base, data):
    """Every target counts once, whatever rows it shares a batch with, and no dropout is applied."""
    run = tiny.trainer(base, data, tiny.settings(batch_size=4), dropout=0.5)
    run.tree.load({name: value + 0.1 for name, value in run.tree.parameters().items()})
    total = 0.0
    module = tiny.alone(base, run.tree.adapter())
    for example in data:
        logits = module(mx.array([example.tokens[:-1]]))[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        total -= sum(logprobs[i - 1, example.tokens[i]].item() for i in range(example.offset, len(example.tokens)))
    out = []
    tiny.drive(run.evaluate_all(out))
    assert out[0] == pytest.approx(total / sum(e.targets for e in data), rel=1e-5)


def test_evaluation_during_the_run_does_not_disturb_it(base, data):
    """`eval_every` adds its own curve and changes no loss; the last step is left to the final evaluation.

    With nothing held out it is of the first rows, as many as a step takes.
    """
    section = tiny.settings(max_steps=4)
    first = []
    plain = trained(base, data, section, dropout=0.3, on_step=lambda run: tiny.drive(run.evaluate(data[:4], first)))
    watched = trained(base, data, section.model_copy(update={"eval_every": 1}), dropout=0.3)
    assert [row["loss"] for row in watched.history.evals] == first[:3]
    assert tiny.losses(watched) == tiny.losses(plain)
    assert tiny.equal(watched.tree.parameters(), plain.tree.parameters())
    assert [row["step"] for row in watched.history.evals] == [1, 2, 3]


def test_stop_loss_ends_the_run(base, data):
    """The run ends after the first step below `stop_loss`, and says so."""
    full = trained(base, data, tiny.settings(max_steps=12, lr=3e-3))
    limit = tiny.losses(full)[5] + 1e-6
    first = next(i for i, loss in enumerate(tiny.losses(full)) if loss < limit)
    run = trained(base, data, tiny.settings(max_steps=12, lr=3e-3, stop_loss=limit))
    assert run.step == first + 1 < 12
    assert f"step {run.step}" in run.finished_early


def test_an_exploding_rate_is_refused_with_what_to_do(base, data):
    """A loss that is not finite ends the batch with `NonFinite`, its step, and a hint."""
    run = tiny.trainer(base, data, tiny.settings(lr=1e30))
    with pytest.raises(NonFinite) as caught:
        tiny.drive(run.run())
    assert caught.value.details == {"step": 2}
    assert "training.lr" in caught.value.hint


def test_a_ruinous_last_step_is_noticed(base, data):
    """The loss of the last step is from before its update: the evaluation that follows refuses the weights."""
    run = tiny.trainer(base, data, tiny.settings(lr=1e30, max_steps=1))
    tiny.drive(run.run())
    with pytest.raises(NonFinite) as caught:
        tiny.drive(run.evaluate_all([]))
    assert caught.value.details == {"step": 1}


def test_one_example_is_enough(base):
    """A dataset of one example trains with the default batch settings, and is learnt."""
    section = tiny.settings(batch_size=8, grad_accum=16, max_steps=30, lr=3e-3)
    run = trained(base, tiny.examples(1), section, names=["all-linear"])
    assert tiny.losses(run)[-1] < 0.1


def test_examples_without_targets_are_left_out(base, data):
    """An example with nothing to learn counts for nothing; a batch of only such is refused."""
    empty = Encoded((1, 2, 3), 3)
    with_empty = trained(base, [*data, empty], tiny.settings())
    assert_same(with_empty, trained(base, data, tiny.settings()))
    with pytest.raises(TrainingFailed, match="No example"):
        tiny.trainer(base, [empty], tiny.settings())


def test_progress_is_counted(base, data):
    """Steps, tokens with their padding, and an estimate of the time that is left."""
    seen = []
    run = tiny.trainer(base, data, tiny.settings(), on_step=lambda t: seen.append((t.step, t.eta_s)))
    assert run.eta_s is None
    tiny.drive(run.run())
    assert [step for step, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == 0.0
    assert run.trained_tokens == sum(row["tokens"] for row in run.history.steps)
    assert run.trained_tokens >= sum(e.targets for e in data) * 2
    assert run.tokens_per_s > 0


def test_the_base_is_neither_copied_nor_changed(base, data):
    """A training tree takes no more memory than its adapter, and training leaves base and class alone."""
    before = {name: mx.array(value) for name, value in tree_flatten(base.parameters())}
    kind, call = type(base.model.layers[0]), type(base.model.layers[0]).__call__
    mx.eval(before)
    held = mx.get_active_memory()
    tree = tiny.tree(base, grad_checkpoint=True)
    adapter = sum(value.nbytes for value in tree.parameters().values())
    assert mx.get_active_memory() - held < adapter + 4096
    trained(base, data, tiny.settings(grad_checkpoint=True))
    assert tiny.equal(dict(tree_flatten(base.parameters())), before)
    assert type(base.model.layers[0]) is kind
    assert kind.__call__ is call
