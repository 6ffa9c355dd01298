"""Rows in two halves, side by side: the same losses, gradients and answers, whatever the rows are."""

import mlx.core as mx
import pytest
import tiny
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from running import FACTS, QUICK, running

from radiance_mlx import blas
from radiance_mlx.engine import generation
from radiance_mlx.engine import slices as slices_module
from radiance_mlx.engine.generation import JoiningGenerator
from radiance_mlx.engine.planner import Action, Planner
from radiance_mlx.engine.slices import Slices
from radiance_mlx.errors import Cancelled
from radiance_mlx.lora import halves, trainer
from radiance_mlx.lora.batches import as_batch
from radiance_mlx.lora.encoding import Encoded
from radiance_mlx.lora.halves import halves_here, in_halves
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.prefix import install_prefix
from radiance_mlx.lora.rehearsal import Rehearsal, Source, teacher
from radiance_mlx.lora.step import LossFunction, MicroBatch, MicroBatchResult, Piece
from radiance_mlx.lora.targets import LINEAR, find_targets, input_dims
from radiance_mlx.lora.trainer import Trainer
from radiance_mlx.lora.tree import make_tree

DATA = tiny.examples(7)


@pytest.fixture(scope="module")
def base():
    return tiny.model()


@pytest.fixture
def _any_size_pays(monkeypatch):
    monkeypatch.setattr(halves, "FEWEST", 1)
    monkeypatch.setattr(generation, "WORTH_HALVING", 1)


def trained(
    base, monkeypatch, *, halved, slice_s=1.0, layers=-1, rehearsed=False, grad_checkpoint=False, dropout=0.0, **changes
):
    """A run that is through, and the threads that its pieces were for."""
    monkeypatch.setattr(trainer, "halved", lambda setting: halved)
    section = tiny.settings(batch_size=3, max_steps=4, grad_checkpoint=grad_checkpoint, **changes)
    targets = find_targets(base, ["o_proj", "down_proj"] if layers > 0 else ["q_proj", "v_proj"], layers)
    options = {"rank": 4, "scale": 2.0, "dropout": dropout, "seed": 0, "grad_checkpoint": grad_checkpoint}
    tree = make_tree(base, targets, **options)
    head = install_head(tree.module, tiny.VOCAB, narrow=not grad_checkpoint)
    install_prefix(tree, 1000, 2**30 if layers > 0 else 0)
    rehearsal = None
    if rehearsed:
        taught = []
        tiny.drive(teacher(tree, head, tiny.examples(5, seed=9), taught))
        rehearsal = Rehearsal([Source(taught)], kl_weight=1.0, rows=3)
    run, threads = Trainer(tree, head, DATA, section, 1, rehearsal=rehearsal), set()

    def watched():
        for piece in run.run():
            threads.add(piece.threads)
            yield piece

    slices = Slices(watched(), lambda: None)
    while not slices.run(slice_s):
        pass
    return run, threads


@pytest.mark.usefixtures("_any_size_pays")
@pytest.mark.parametrize(
    "options",
    [{}, {"grad_checkpoint": True}, {"layers": 1}, {"rehearsed": True}, {"rehearsed": True, "layers": 1}],
    ids=["plain", "checkpointed", "prefix", "rehearsed", "rehearsed after a prefix"],
)
def test_a_run_in_halves_is_the_run(base, monkeypatch, options):
    """Losses, divergences, norms and weights of every step, to rounding; odd numbers of rows among them."""
    whole, threads = trained(base, monkeypatch, halved=False, **options)
    assert threads == {0}
    half, threads = trained(base, monkeypatch, halved=True, **options)
    assert threads == {0, 1}
    for one, other in zip(half.history.steps, whole.history.steps, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
    for name, weight in half.tree.parameters().items():
        assert mx.allclose(weight, whole.tree.parameters()[name], rtol=1e-2, atol=2e-4), name


@pytest.mark.usefixtures("_any_size_pays")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_slices_change_no_bit_of_it(base, monkeypatch, dropout):
    """However the pieces of both halves fall together; what is dropped, too, is each half's own and the step's."""
    one, other = (trained(base, monkeypatch, halved=True, slice_s=s, dropout=dropout)[0] for s in (1e-6, 1.0))
    assert one.history.steps == other.history.steps
    for name, weight in one.tree.parameters().items():
        assert mx.array_equal(weight, other.tree.parameters()[name])


def test_a_run_that_is_ended_leaves_nothing_under_way():
    """On any stream: a thread that ends with work on one would never be left by the interpreter."""
    asked, stream = [], halves.streams()[1]

    def check():
        asked.append(len(asked))
        if len(asked) == 3:
            raise Cancelled("enough")

    def pieces():
        with mx.stream(stream):
            x = mx.random.normal((600, 600))
            while True:
                x = mx.tanh(x @ x)
                yield Piece([x])

    slices = Slices(pieces(), check)
    with pytest.raises(Cancelled):
        slices.run(10.0)
    assert not slices._begun


class Clock:
    """Time that passes only when something is waited for: what each array takes, in seconds."""

    def __init__(self, monkeypatch):
        self.now = 1.0
        monkeypatch.setattr(slices_module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(slices_module, "mx", self)
        monkeypatch.setattr(slices_module, "use_threads", lambda count: None)

    def async_eval(self, arrays):
        pass

    def eval(self, groups):
        self.now += sum(sum(arrays) for arrays in groups)


@pytest.mark.parametrize(("piece_s", "leaves"), [(0.002, True), (0.2, False)])
def test_a_slice_may_end_with_its_last_pieces_under_way(monkeypatch, piece_s, leaves):
    """If they are short: what they take is known well enough, and part of the slice. Dear ones are timed."""
    clock = Clock(monkeypatch)
    slices = Slices((Piece([piece_s]) for _ in range(400)), lambda: None)
    slices.run(0.05, leave=True)
    for _ in range(6):
        clock.now += 0.03  # a step of others
        began = clock.now
        assert not slices.run(0.05, leave=True)
        assert (slices.under_way_s > 0) is leaves
        if leaves:
            left = piece_s * sum(map(len, slices._begun))
            assert slices.under_way_s == pytest.approx(left, rel=0.5)
            assert clock.now - began + left <= 0.06
    while not slices.run(1.0, leave=True):
        pass
    assert slices.under_way_s == 0


def test_a_slice_ends_with_nothing_under_way_unless_that_is_wished(monkeypatch):
    """And so it does at a barrier, whose followers may need what was computed."""
    Clock(monkeypatch)
    slices = Slices((Piece([0.002]) for _ in range(200)), lambda: None)
    assert not slices.run(0.05)
    assert slices.under_way_s == 0
    barred = Slices((Piece([0.002], barrier=True) for _ in range(200)), lambda: None)
    assert not barred.run(0.05, leave=True)
    assert barred.under_way_s == 0


def test_what_cannot_be_halved_or_does_not_pay_stays_whole():
    """A single row; few tokens; a half without a target."""
    rows = [Encoded(tuple(range(3, 43)), 30), Encoded(tuple(range(3, 43)), 20)]
    tokens, spans = as_batch(rows)
    assert in_halves((tokens, spans), 81) == []  # 80 tokens
    parts = in_halves((tokens, spans, mx.arange(30), 30), 80)
    assert [[x.shape[0] for x in part[:3]] for part in parts] == [[1, 1, 10], [1, 1, 20]]
    assert mx.concatenate([part[2] for part in parts]).tolist() == list(range(30))
    assert [part[3] for part in parts] == [30, 30]
    assert in_halves((tokens[:1], spans[:1]), 1) == []

    nothing = mx.array([[40, 39], [20, 39]])
    assert in_halves((tokens, nothing), 1) == []


@pytest.mark.parametrize("bits", [None, 4])
def test_fewer_tokens_pay_where_layers_have_more_weights(monkeypatch, bits):
    """Of all linears in the mean, as they are before they are quantised; the embedding and norms do not count."""
    base = tiny.model(bits=bits)
    del base.layers[0].mlp["down_proj"]
    weights = [
        sum(m.weight.shape[0] * input_dims(m) for m in layer.modules() if isinstance(m, LINEAR))
        for layer in base.layers
    ]
    assert min(weights) < sum(weights) / len(weights) < max(weights)
    mean = sum(weights) // len(weights)
    for large, fewest in ((mean, halves.FEWEST_OF_LARGE), (mean + 1, halves.FEWEST)):
        monkeypatch.setattr(halves, "LARGE", large)
        assert halves.fewest_tokens(base) == fewest
    assert weights[1] == sum(m.weight.shape[0] * m.weight.shape[1] for m in _linears(tiny.model().layers[1]))


def _linears(layer):
    return [m for m in layer.modules() if isinstance(m, LINEAR)]


@pytest.mark.parametrize(("large", "parts"), [(1, 2), (10**9, 1)])
def test_a_micro_batch_goes_by_its_models_layers(monkeypatch, large, parts):
    """Of 200 tokens: too few for a small model."""
    monkeypatch.setattr(halves, "LARGE", large)
    base = tiny.model()
    tree = make_tree(base, find_targets(base, ["q_proj"]), rank=2, scale=1.0, dropout=0.0, seed=0)
    rows = [Encoded(tuple(range(3, 54)), 30) for _ in range(4)]
    seen, loss = [], LossFunction(tree, None)

    def noting(module, tokens, spans):
        seen.append(tokens.shape[0])
        return loss(module, tokens, spans)

    micro = MicroBatch(tree, noting, halved=True)
    for piece in micro.pieces(as_batch(rows), mx.random.key(0), MicroBatchResult()):
        mx.eval(piece.arrays)
    assert seen == [4 // parts] * parts


def test_where_it_is_done(monkeypatch):
    """On the CPU, where OpenBLAS has two threads and can be told to use one."""
    monkeypatch.setattr(blas, "can_use_fewer", lambda: True)
    for threads, pays in ((0, False), (1, False), (2, True), (8, False)):
        monkeypatch.setattr(blas, "threads", lambda threads=threads: threads)
        assert halves_here() is pays
    monkeypatch.setattr(blas, "threads", lambda: 2)
    assert halves_here()
    monkeypatch.setattr(blas, "can_use_fewer", lambda: False)
    assert not halves_here()
    monkeypatch.setattr(blas, "can_use_fewer", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert not halves_here()


class Streams:
    """A model that notes on which stream, and with how many rows, its prompts are computed."""

    def __init__(self, inner):
        self.inner, self.layers, self.seen = inner, inner.layers, []

    def __call__(self, tokens, cache):
        if tokens.shape[1] > 1:
            self.seen.append((str(mx.default_stream(mx.cpu)), tokens.shape[0]))
        return self.inner(tokens, cache=cache)


def said(kind, model, prompts, **options):
    """Ten tokens to each, all of them asked at once."""
    stream = mx.default_stream(mx.default_device())
    running = kind(model, stream=stream, max_tokens=10, prefill_batch_size=8, **options)
    return tiny.drain(running, running.insert([list(prompt) for prompt in prompts]))


@pytest.mark.usefixtures("_any_size_pays")
@pytest.mark.parametrize("part", [4, 30, 200])
def test_prompts_in_halves_are_answered_as_they_are(base, part):
    """Of several lengths, in passes of any size: keys and values of both halves come together in the right order."""
    prompts = tiny.prompts(30, 7, 12, 21, 2, seed=4)
    expected = [said(BatchGenerator, base, [prompt])[0] for prompt in prompts]
    model = Streams(base)
    assert said(JoiningGenerator, model, prompts, prefill_step_size=part, halved=True) == expected
    assert len({stream for stream, _ in model.seen}) == 2
    whole = Streams(base)
    assert said(JoiningGenerator, whole, prompts, prefill_step_size=part) == expected
    assert len({stream for stream, _ in whole.seen}) == 1


class Growing(Streams):
    """Of the other half alone: whether a cache with keys from before would have to grow for the prompts' tokens."""

    def __call__(self, tokens, cache):
        if mx.default_stream(mx.cpu) == halves.streams()[1] and cache[0].keys is not None:
            assert cache[0].keys.shape[2] >= cache[0]._idx + tokens.shape[1]
            self.seen.append("room")
        return self.inner(tokens, cache=cache)


@pytest.mark.usefixtures("_any_size_pays")
@pytest.mark.parametrize("part", [4, 200])
@pytest.mark.parametrize("known", [(5, 5, 5, 5), (9, 0, 70, 3), (0, 0, 6, 6)])
def test_prompts_whose_beginnings_are_kept_are_halved_alike(base, monkeypatch, known, part):
    """Each with so many tokens in its cache: the same answers; keys are given their room, and computed, beforehand.

    What a half's stream makes of them first, the other one would wait for.
    """
    ready, real = [], generation._with_room

    def with_room(cache, width):
        ready.append(real(cache, width))
        return ready[-1]

    monkeypatch.setattr(generation, "_with_room", with_room)
    evaluate = mx.eval

    def noting(*arrays):
        arrays_given = [a for one in arrays if isinstance(one, list) for a in one if isinstance(a, list)]
        ready[:] = [some for some in ready if not any(some is given for given in arrays_given)]
        return evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", noting)
    prompts = tiny.prompts(90, 7, 92, 30, seed=5)
    expected = [said(BatchGenerator, base, [prompt])[0] for prompt in prompts]

    def kept(prompt, count):
        cache = make_prompt_cache(base)
        if count:
            mx.eval(base(mx.array([prompt[:count]]), cache=cache))
        return cache

    model = Growing(base)
    stream = mx.default_stream(mx.default_device())
    running = JoiningGenerator(model, stream=stream, max_tokens=10, prefill_step_size=part, halved=True)
    pairs = list(zip(prompts, known, strict=True))
    uids = running.insert(
        [prompt[count:] for prompt, count in pairs],
        caches=[kept(*pair) for pair in pairs],
        all_tokens=[prompt[:count] for prompt, count in pairs],
    )
    assert tiny.drain(running, uids) == expected
    assert model.seen
    assert not ready


@pytest.mark.usefixtures("_any_size_pays")
@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_the_service_learns_and_answers_by_it(tmp_path, monkeypatch, wanted):
    """`training.halves` and `serving.halves`: off is off."""
    monkeypatch.setattr(blas, "threads", lambda: 2)
    monkeypatch.setattr(blas, "can_use_fewer", lambda: True)
    used = [0]
    monkeypatch.setattr(blas, "used", lambda: used[-1] or 2)
    monkeypatch.setattr(blas, "use", lambda count=0: used.append(count))
    flags = {**QUICK, "training.max_steps": 30, "training.batch_size": 4, "backend": "cpu"}
    with running(tmp_path, flags, training__halves=wanted, serving__halves=wanted) as service:
        service.learn(*FACTS[:4])
        assert (1 in used) is (wanted == "auto")
        assert service.ask(FACTS[0][0]).text == FACTS[0][1]


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="elsewhere slices leave nothing under way")
def test_the_planner_hears_what_training_leaves_under_way(tmp_path, monkeypatch):
    """After its slices only, and not after every one: a step of training ends with nothing."""
    told, real = [], Planner.charge

    def charge(self, action, seconds, under_way_s):
        told.append((action, under_way_s))
        return real(self, action, seconds, under_way_s)

    monkeypatch.setattr(Planner, "charge", charge)
    with running(tmp_path, {**QUICK, "training.max_steps": 30, "training.slice_ms": 5, "backend": "cpu"}) as service:
        service.learn(FACTS[0])
        service.ask(FACTS[0][0])
    left = {action: {bool(seconds) for of, seconds in told if of is action} for action in Action}
    assert left[Action.BACKGROUND] == {False, True}
    assert left[Action.GENERATE] == {False}
