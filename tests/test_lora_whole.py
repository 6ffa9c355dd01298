"""Our trainer against mlx-lm's own `train`: the same curve and the same adapter."""

import contextlib
import copy
import io

import mlx.core as mx
import mlx.optimizers as optim
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

from radiance_mlx.errors import Cancelled, NonFinite
from radiance_mlx.lora.batches import batch_stream
from radiance_mlx.lora.trainer import Trainer
from radiance_mlx.lora.whole import run_whole


@pytest.fixture(scope="module")
def base():
    return tiny.model()


@pytest.fixture(scope="module")
def data():
    return tiny.examples(7)


class Losses(TrainingCallback):
    """mlx-lm's reports."""

    def __init__(self):
        self.values = []

    def on_train_loss_report(self, train_info):
        self.values.append(train_info["train_loss"])


def mlx_lm_run(base, data, section, folder, start):
    """(losses, weights) of `mlx_lm.tuner.trainer.train` with nothing of ours but the order of the data."""
    model = copy.deepcopy(base)
    model.freeze()
    keys = {f"self_attn.{name}" for name in tiny.ATTENTION}
    linear_to_lora_layers(model, -1, {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys})
    model.load_weights(list(start.items()), strict=False)
    seen = Losses()
    with contextlib.redirect_stdout(io.StringIO()):
        train(
            model,
            optim.Adam(learning_rate=section.lr),
            data,
            args=TrainingArgs(
                batch_size=section.batch_size,
                iters=section.max_steps * section.grad_accum,
                steps_per_report=section.grad_accum,
                steps_per_save=10**6,
                grad_accumulation_steps=section.grad_accum,
                adapter_file=str(folder / "adapters.safetensors"),
            ),
            iterate_batches=lambda **_: batch_stream(
                data, batch_size=section.batch_size, max_tokens=2048, seed=(section.seed, 1)
            ),
            training_callback=seen,
        )
    return seen.values, dict(tree_flatten(model.trainable_parameters()))


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_mlx_lm_trains_the_same(base, data, tmp_path, grad_accum):
    """From the same start in the same order, mlx-lm's loop gives our losses and our adapter."""
    section = tiny.settings(grad_accum=grad_accum, max_steps=6, lr=1e-3)
    ours = tiny.trainer(base, data, section)
    start = ours.tree.parameters()
    tiny.drive(ours.run())

    losses, weights = mlx_lm_run(base, data, section, tmp_path, start)

    assert len(set(losses)) == 6
    assert tiny.losses(ours) == pytest.approx(losses, abs=1e-5)
    assert tiny.furthest(ours.tree.parameters(), weights) < 1e-5
    assert tiny.furthest(ours.tree.parameters(), start) > 1e-3


# --- slice_ms: 0 ---------------------------------------------------------------------------------


def whole(base, data, section, on_step=lambda trainer: None, **options):
    """A batch trained by `run_whole`."""
    run = Trainer(tiny.tree(base, plain=True, **options), None, data, section, 1)
    tiny.drive(run_whole(run, on_step))
    return run


SETTINGS = {
    "plain": {},
    "clipping": {"clip_norm": 0.3},
    "cosine": {"schedule": "cosine", "warmup_steps": 2},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.5, "schedule": "linear"},
    "checkpointed": {"grad_checkpoint": True},
    "few examples": {"batch_size": 4, "grad_accum": 8},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_in_one_piece_is_as_in_slices(base, data, changes):
    """Losses, rates and weights are those of the sliced run under every setting; rows are padded to 32 tokens."""
    section = tiny.settings(max_steps=5, lr=1e-3, **changes)
    sliced = tiny.trainer(base, data, section, full_head=True)
    tiny.drive(sliced.run())
    seen = []
    in_one = whole(base, data, section, lambda run: seen.append(run.step))

    assert seen == [1, 2, 3, 4, 5]
    for key in ("step", "loss", "lr"):
        assert [row[key] for row in in_one.history.steps] == pytest.approx(
            [row[key] for row in sliced.history.steps], rel=1e-5
        )
    assert tiny.furthest(in_one.tree.parameters(), sliced.tree.parameters()) < 1e-4
    tokens = [row["tokens"] for row in in_one.history.steps]
    assert all(number % 32 == 0 for number in tokens)
    assert in_one.trained_tokens == sum(tokens) > sliced.trained_tokens
    assert in_one.tokens_per_s > 0


def test_the_parents_optimizer_goes_on(base, data):
    """A lineage continues in one piece as it does in slices."""
    section = tiny.settings(lr=1e-3)
    parent = whole(base, data, section)
    child = Trainer(tiny.tree(base, plain=True), None, data, section, 1)
    assert child.start_from(*parent.state()[:2])
    tiny.drive(run_whole(child, lambda trainer: None))
    sliced = tiny.trainer(base, data, section, full_head=True)
    sliced.start_from(*parent.state()[:2])
    tiny.drive(sliced.run())
    assert tiny.losses(child) == pytest.approx(tiny.losses(sliced), rel=1e-5)
    assert tiny.furthest(child.tree.parameters(), sliced.tree.parameters()) < 1e-5


def test_stop_loss_ends_it(base, data):
    """The run ends where the sliced one does, with the weights of that step."""
    section = tiny.settings(max_steps=8, lr=1e-3)
    full = whole(base, data, section)
    limit = sorted(tiny.losses(full))[3]
    section = section.model_copy(update={"stop_loss": limit})
    stopped = whole(base, data, section)
    sliced = tiny.trainer(base, data, section, full_head=True)
    tiny.drive(sliced.run())
    assert stopped.step == sliced.step < 8
    assert stopped.finished_early == sliced.finished_early != ""
    assert tiny.furthest(stopped.tree.parameters(), sliced.tree.parameters()) < 1e-4


def test_the_shared_class_is_left_unpatched(base, data):
    """mlx-lm's gradient checkpointing patches the layers' class: afterwards it is as before, also after a fault."""
    kind = type(base.model.layers[0])
    before = kind.__call__

    def cancel(run):
        assert kind.__call__ is not before
        raise Cancelled("The job was cancelled.")

    section = tiny.settings(grad_checkpoint=True)
    whole(base, data, section)
    assert kind.__call__ is before
    with pytest.raises(Cancelled):
        whole(base, data, section, cancel)
    assert kind.__call__ is before


def test_an_exploding_rate_is_refused(base, data):
    """A loss that is not finite ends the run with `NonFinite` at its step."""
    with pytest.raises(NonFinite) as caught:
        whole(base, data, tiny.settings(lr=1e30))
    assert caught.value.details == {"step": 2}


def test_it_prints_nothing_and_leaves_no_file(base, data, tmp_path, capfd, monkeypatch):
    """mlx-lm's progress bars and its saved adapter stay out of the service's way."""
    monkeypatch.chdir(tmp_path)
    whole(base, data, tiny.settings())
    mx.synchronize()
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
