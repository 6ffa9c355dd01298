"""The layers below the lowest adapted one: computed once for each row, and nothing changes by it."""

from collections import deque
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from architectures import ARCHITECTURES, GEMMA2
from running import FACTS, QUICK, running

from radiance_mlx.engine import preparing
from radiance_mlx.lora import kept as kept_on_disk
from radiance_mlx.lora.batches import batch_stream
from radiance_mlx.lora.encoding import Encoded
from radiance_mlx.lora.focus import row_losses
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.kept import load_kept, parts_of, save_kept
from radiance_mlx.lora.prefix import install_prefix
from radiance_mlx.lora.rehearsal import (
    HIDDEN,
    Rehearsal,
    Source,
    begin,
    load_rows,
    save_hidden,
    save_rows,
    teacher,
    with_hidden,
)
from radiance_mlx.lora.replay import Replay
from radiance_mlx.lora.targets import find_targets
from radiance_mlx.lora.trainer import Trainer
from radiance_mlx.lora.tree import adapter_tree, idle_adapter, make_tree

MODELS = {"llama": tiny.LLAMA, "gemma2": GEMMA2, **ARCHITECTURES}
PLENTY = 2**30
DATA = tiny.examples(5)


def trainer(base, limit, *, layers=1, names=("o_proj",), grad_checkpoint=False, rehearsal=None, replay=None, **changes):
    """The last `layers` layers adapted; `limit` bytes may be kept of what is below them."""
    section = tiny.settings(**{"batch_size": 2, "grad_accum": 2, "max_steps": 6, "eval_every": 2, **changes})
    options = {"rank": 4, "scale": 2.0, "dropout": 0.0, "seed": 0, "grad_checkpoint": grad_checkpoint}
    tree = make_tree(base, find_targets(base, names, layers), **options)
    head = install_head(tree.module, tiny.VOCAB, narrow=not grad_checkpoint)
    install_prefix(tree, sum(len(row.tokens) for row in DATA), limit)
    return Trainer(tree, head, DATA, section, 1, rehearsal=rehearsal, replay=replay)


def trained(base, limit, **options):
    run = trainer(base, limit, **options)
    tiny.drive(run.run())
    return run


def counted(layer):
    """A list that grows by the number of rows that `layer`, or one of its copies, is given."""
    rows, kind = [], type(layer)

    def call(self, x, *more, **named):
        rows.append(x.shape[0])
        return kind.__call__(self, x, *more, **named)

    layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return rows


@pytest.mark.parametrize("options", [{}, {"layers": 2}, {"grad_checkpoint": True}, {"eval_fraction": 0.4}], ids=str)
def test_losses_and_weights_are_those_of_the_whole_pass(options):
    base = tiny.model()
    without, run = trained(base, 0, **options), trained(base, PLENTY, **options)
    assert without.tree.prefix is None
    assert run.tree.prefix.nbytes > 0
    assert tiny.losses(run) == pytest.approx(tiny.losses(without), rel=1e-5)
    evals = [row["loss"] for row in without.history.evals]
    assert [row["loss"] for row in run.history.evals] == pytest.approx(evals, rel=1e-5)
    assert tiny.furthest(run.tree.parameters(), without.tree.parameters()) < 1e-4


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_architecture_learns_the_same(config):
    """In all of these the layers pass everything on in one array."""
    base = tiny.model(config)
    names = ["all-linear"] if "moe" not in config["model_type"] else ["o_proj"]
    without, run = trained(base, 0, names=names), trained(base, PLENTY, names=names)
    assert run.tree.prefix is not None
    assert tiny.losses(run) == pytest.approx(tiny.losses(without), rel=1e-4)


MLP = ("gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3")


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_where_mlps_are_adapted_the_attention_before_them_is_kept_too(config):
    """And where both are done side by side it is not: there, what comes before the layer is."""
    if "moe" in config["model_type"]:
        pytest.skip("its experts are named otherwise")
    base = tiny.model(config)
    names = [name for name in MLP if any(path.endswith("." + name) for path, _ in base.named_modules())]
    without, run = trained(base, 0, names=names), trained(base, PLENTY, names=names)
    within = not config["model_type"].startswith("cohere")
    assert ("_" in run.tree.prefix.depth) == within, run.tree.prefix.depth
    assert tiny.losses(run) == pytest.approx(tiny.losses(without), rel=1e-4)
    once = trained(base, PLENTY, names=names, replay=Replay(tiny.examples(3, seed=5), 0.5, 1))
    whole = trained(base, 0, names=names, replay=Replay(tiny.examples(3, seed=5), 0.5, 1))
    assert tiny.losses(once) == pytest.approx(tiny.losses(whole), rel=1e-4)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_the_attention_of_the_first_adapted_layer_sees_each_row_once(grad_checkpoint):
    """Of two adapted layers; also where a layer is computed again for the gradient."""
    base = tiny.model({**tiny.LLAMA, "num_hidden_layers": 3})
    options = {"names": MLP[:2], "layers": 2, "grad_checkpoint": grad_checkpoint}
    seen = counted(base.layers[1].self_attn)
    run = trainer(base, PLENTY, **options)
    assert run.tree.prefix.depth == "1_self_attn"
    tiny.drive(run.tree.prefix.fill(DATA))
    seen.clear()
    tiny.drive(run.run())
    assert seen == []
    assert tiny.losses(run) == pytest.approx(tiny.losses(trained(base, 0, **options)), rel=1e-4)


def test_rows_that_are_filled_in_together_are_those_that_come_alone():
    """But for rounding; a row that comes twice is kept once, and one without inputs not at all."""
    run, alone = trainer(tiny.model(), PLENTY), trainer(tiny.model(), PLENTY)
    tiny.drive(run.tree.prefix.fill([*DATA, DATA[0], Encoded((3,), 0)]))
    bytes_each = 4 * tiny.LLAMA["hidden_size"]
    assert run.tree.prefix.nbytes == bytes_each * sum(len(row.tokens) - 1 for row in DATA)
    batch, kept, found = next(batch_stream(DATA, batch_size=5, max_tokens=64, seed=(0, 0))), [], []
    tiny.drive(run.tree.prefix.pieces(batch, kept))
    tiny.drive(alone.tree.prefix.pieces(batch, found))
    assert mx.allclose(kept[0], found[0], rtol=1e-4, atol=1e-3).item()


def test_each_row_is_computed_once():
    base = tiny.model()
    rows = counted(base.layers[0])
    run = trainer(base, PLENTY)
    rows.clear()
    tiny.drive(run.run())
    assert rows == [1] * len(DATA)


def test_a_row_is_the_same_in_any_company():
    """Bit by bit: a run that was interrupted meets its rows in another order."""
    base = tiny.model()
    batches = [next(batch_stream(DATA, batch_size=size, max_tokens=64, seed=(0, 0))) for size in (1, 3, 5)]
    found = {}
    for batch in batches:
        run, hidden = trainer(base, PLENTY), []
        tiny.drive(run.tree.prefix.pieces(batch, hidden))
        for tokens, end, row in zip(batch[0].tolist(), batch[1][:, 1].tolist(), hidden[0], strict=True):
            kept = found.setdefault(tuple(tokens[:end]), row[:end])
            assert mx.array_equal(row[:end], kept).item()
    assert len(found) == len(DATA)


def test_rows_that_are_only_measured_are_not_kept():
    run, out = trainer(tiny.model(), PLENTY), []
    tiny.drive(run.evaluate(tiny.examples(3, seed=9), out))
    assert run.tree.prefix.nbytes == 0


# --- rows that are rehearsed ---------------------------------------------------------------------


def rehearsed(base, limit, seed=11):
    """Rows with what the base says to them; `limit` bytes may be kept of what is below the last layer."""
    adapter = idle_adapter(base, find_targets(base, ["o_proj"], 1))
    tree, out = adapter_tree(base, adapter), []
    data = tiny.examples(6, seed=seed)
    head = install_head(tree.module, tiny.VOCAB)
    install_prefix(tree, sum(len(row.tokens) for row in data), limit)
    tiny.drive(teacher(tree, head, data, out, together=2 * 64))
    return out


def rehearsal(rows, **options):
    return Rehearsal([Source(rows)], kl_weight=2.0, rows=3, **options)


def test_what_is_rehearsed_begins_where_the_adapted_layers_do():
    """What the base was asked is not computed again: the same run, and its lower layers see the lesson's rows alone."""
    base = tiny.model()
    rows, whole = rehearsed(base, PLENTY), rehearsed(base, 0)
    assert all(r.hidden.shape == (len(r.row.tokens) - 1, tiny.LLAMA["hidden_size"]) for r in rows)
    assert [r.hidden for r in whole] == [None] * len(rows)
    for row, other in zip(rows, whole, strict=True):
        assert abs(row.logprobs - other.logprobs).max() < 1e-5
    without, run = trained(base, PLENTY, rehearsal=rehearsal(whole)), trained(base, PLENTY, rehearsal=rehearsal(rows))
    assert [row["kl"] for row in run.history.steps] == pytest.approx(
        [row["kl"] for row in without.history.steps], rel=1e-4, abs=1e-6
    )
    assert tiny.furthest(run.tree.parameters(), without.tree.parameters()) < 1e-4
    some = [trained(base, PLENTY, rehearsal=rehearsal(which, row_targets=3)) for which in (whole, rows)]
    assert tiny.furthest(some[0].tree.parameters(), some[1].tree.parameters()) < 1e-4
    assert tiny.furthest(some[0].tree.parameters(), run.tree.parameters()) > 1e-3
    seen = counted(base.layers[0])
    run = trainer(base, PLENTY, rehearsal=rehearsal(rows))
    seen.clear()
    tiny.drive(run.run())
    assert seen == [1] * len(DATA)


def test_a_step_whose_rows_are_not_all_kept_makes_the_whole_pass():
    base = tiny.model()
    rows = rehearsed(base, PLENTY)
    some = [replace(r, hidden=None) if i % 2 else r for i, r in enumerate(rows)]
    run, without = (trained(base, PLENTY, rehearsal=rehearsal(r)) for r in (some, rehearsed(base, 0)))
    assert tiny.furthest(run.tree.parameters(), without.tree.parameters()) < 1e-4
    no_room = trained(base, 0, rehearsal=rehearsal(rows))  # none for the lesson's rows either
    assert tiny.furthest(no_room.tree.parameters(), without.tree.parameters()) < 1e-4


def test_what_another_prefix_made_is_forgotten():
    """The run is that of rows of which nothing was kept."""
    base = tiny.model()
    made = rehearsal(rehearsed(base, PLENTY))
    assert made.begun
    made.forget_hidden()
    assert not made.begun
    run, without = trained(base, PLENTY, rehearsal=made), trained(base, PLENTY, rehearsal=rehearsal(rehearsed(base, 0)))
    assert tiny.furthest(run.tree.parameters(), without.tree.parameters()) < 1e-4


def hidden_of(folder, rows, depth="1", limit=PLENTY):
    """`rows` with what is kept of them in `folder`."""
    found = []
    tiny.drive(with_hidden(folder, rows, depth, limit, found))
    return found


def saved(folder, rows):
    save_rows(folder, rows, {})
    tiny.drive(save_hidden(folder, rows, "1"))
    return load_rows(folder)[0]


@pytest.mark.parametrize("part", [1, 3000, PLENTY])
def test_what_was_kept_comes_back_from_the_disk(tmp_path, monkeypatch, part):
    """To the last bit, for the same layers alone, in however many parts; what does not fit, or has changed by a bit, is
    not there.
    """
    monkeypatch.setattr(kept_on_disk, "PART_BYTES", part)
    rows = rehearsed(tiny.model(), PLENTY)
    loaded = saved(tmp_path, rows)
    files = parts_of(tmp_path / HIDDEN)
    assert len(files) == {1: len(rows), PLENTY: 1}.get(part, len(files))
    assert part != 3000 or 1 < len(files) < len(rows)
    assert [r.hidden for r in loaded] == [None] * len(rows)
    for row, again in zip(rows, hidden_of(tmp_path, loaded), strict=True):
        assert mx.array_equal(row.hidden, again.hidden).item()
    assert hidden_of(tmp_path, loaded, "2") == loaded
    more = [*loaded, *rehearsed(tiny.model(), 0, seed=12)]
    assert hidden_of(tmp_path, more) == more
    assert hidden_of(tmp_path, loaded, limit=sum(file.stat().st_size for file in files) - 1) == loaded
    arrays = mx.load(str(files[-1]))
    mx.eval(arrays)
    [name] = [name for name in arrays if name.startswith("below_1_")]
    arrays[name][3, 5] = mx.nan
    mx.save_safetensors(str(files[-1]), arrays)
    assert hidden_of(tmp_path, loaded) == loaded
    files[-1].write_bytes(b"no arrays")
    assert hidden_of(tmp_path, loaded) == loaded
    files[-1].unlink()
    assert hidden_of(tmp_path, loaded) == loaded


def test_equal_rows_are_the_same_before_and_after_the_disk(tmp_path):
    """A pass may round each otherwise, by its place; a job that is taken up again has them from the disk."""
    base = tiny.model()
    tree, rows = adapter_tree(base, idle_adapter(base, find_targets(base, ["o_proj"], 1))), []
    install_prefix(tree, 0, PLENTY)
    data = [row for row in tiny.examples(6, seed=11) for _ in range(3)]
    tiny.drive(teacher(tree, install_head(tree.module, tiny.VOCAB), data, rows, together=5 * 64))
    loaded = hidden_of(tmp_path, saved(tmp_path, rows))
    assert all(mx.array_equal(a.hidden, b.hidden).item() for a, b in zip(rows, loaded, strict=True))


def test_of_a_part_the_wanted_rows_alone_stay_in_memory(tmp_path):
    """What is added later is in parts of its own."""
    kept = {bytes([i, 0, 0, 0]) * 100: mx.full((100, 1000), float(i)) for i in range(20)}
    deque(save_kept(tmp_path / "rows", kept, "1"), 0)
    wanted, other = list(kept)[7], bytes([99, 0, 0, 0]) * 2
    del kept
    deque(save_kept(tmp_path / "rows", {other: mx.ones((2, 1000))}, "1"), 0)
    before = mx.get_active_memory()
    found = {}
    for part in load_kept(tmp_path / "rows", "1", PLENTY, {wanted, other}):
        found.update(part)
    assert set(found) == {wanted, other}
    assert found[wanted][3, 5].item() == 7.0
    assert mx.get_active_memory() - before < 2 * found[wanted].nbytes


def test_what_is_not_there_is_made_again():
    """As the teacher makes it."""
    base = tiny.model()
    rows, out = rehearsed(base, PLENTY), []
    tree = adapter_tree(base, idle_adapter(base, find_targets(base, ["o_proj"], 1)))
    install_prefix(tree, 0, PLENTY)
    tiny.drive(begin(tree, [replace(r, hidden=None) for r in rows], out))
    for row, again in zip(rows, out, strict=True):
        assert again.row == row.row
        assert mx.allclose(row.hidden, again.hidden, rtol=1e-4, atol=1e-4).item()


def test_measuring_what_is_replayed_takes_what_is_kept():
    """And finds what a whole pass finds."""
    base = tiny.model()
    losses = []
    for limit in (0, PLENTY):
        run = trainer(base, limit)
        found = []
        tiny.drive(row_losses(run.tree, run._head, DATA, found))
        losses.append(found)
    assert run.tree.prefix.nbytes > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_service_trains_with_it_where_rows_come_again(tmp_path):
    """nano's own values adapt its last two layers; with as many steps as rows there is nothing to be won."""
    settings = {**QUICK, "training.max_steps": 1_000_000}
    with running(tmp_path, settings) as service:
        service.post(FACTS[0])
        service.wait_for_step(1)
        assert service.engine(lambda engine: engine._task._trainer.tree.prefix.nbytes) > 0
    with running(tmp_path / "once", {**settings, "training.max_steps": 1, "training.batch_size": 1}) as service:
        trees = []
        make = preparing.install_prefix
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(preparing, "install_prefix", lambda tree, *more: trees.append(tree) or make(tree, *more))
            service.learn(FACTS[0], FACTS[1])
        assert trees == []
    rehearsing = {"rehearsal.kl_weight": 1.0, "rehearsal.sources": ["self"], "rehearsal.samples": 8}
    settings |= {"training.max_steps": 200, "training.batch_size": 1, **rehearsing}
    with running(tmp_path / "rehearsed", settings) as service:
        service.post(*FACTS[:150])  # no row comes twice
        service.wait_for_step(1)
        prefix = service.engine(lambda engine: engine._task._trainer.tree.prefix)
        assert prefix is not None
        assert prefix.nbytes == 0


def test_what_does_not_fit_as_a_whole_is_not_kept():
    base = tiny.model()
    tokens = sum(len(row.tokens) for row in DATA)
    size = 4 * tokens * tiny.LLAMA["hidden_size"]
    assert trainer(base, size).tree.prefix is not None
    assert trainer(base, size - 1).tree.prefix is None


@pytest.mark.parametrize(("names", "layers"), [(("q_proj",), -1), (("q_proj", "lm_head"), 1)])
def test_there_is_none_below_an_adapted_first_layer_or_beside_an_adapted_head(names, layers):
    assert trainer(tiny.model(), PLENTY, names=names, layers=layers).tree.prefix is None


class _Remembers(nn.Module):
    """A layer that leaves something for a later one beside its output."""

    def __init__(self, inner, board):
        super().__init__()
        self.inner, self._board, self.use_sliding = inner, board, False

    def __call__(self, x, *more, **named):
        out = self.inner(x, *more, **named)
        left = self._board.pop("left", None)
        self._board["left"] = out * 0.5
        return out if left is None else out + left


def test_where_layers_tell_each_other_more_than_their_output_nothing_is_kept():
    """And the layers are as they were."""
    base, board = tiny.model(), {}
    for i, layer in enumerate(base.layers):
        base.layers[i] = _Remembers(layer, board)
    tree = make_tree(base, find_targets(base, ["o_proj"], 1), rank=4, scale=2.0, dropout=0.0, seed=0)
    before = [type(layer) for layer in tree.module.layers]
    install_prefix(tree, 10, PLENTY)
    assert tree.prefix is None
    assert [type(layer) for layer in tree.module.layers] == before


def test_other_trees_on_the_same_base_make_the_whole_pass():
    base = tiny.model()
    tokens = mx.array(tiny.prompts(6))
    before = base(tokens)
    run = trained(base, PLENTY)
    assert mx.array_equal(base(tokens), before).item()
    assert run.tree.module(tokens).shape == before.shape
