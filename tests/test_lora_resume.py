"""Going on: after an interruption bit by bit the same, and from a parent's weights and optimizer."""

import json

import mlx.core as mx
import pytest
import tiny

from radiance_mlx.errors import ModelError, TrainingFailed
from radiance_mlx.lora import files
from radiance_mlx.lora.optimizer import restore, state_arrays
from radiance_mlx.lora.trainer import Trainer


@pytest.fixture(scope="module")
def base():
    return tiny.model()


@pytest.fixture(scope="module")
def data():
    return tiny.examples(5)


SETTINGS = {
    "adam": {},
    "adamw, schedule, clipping": {
        "optimizer": "adamw",
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup_steps": 2,
        "clip_norm": 0.5,
    },
    "evaluations": {"eval_every": 1},
    "checkpointed": {"grad_checkpoint": True},
}


def kept(run, folder):
    """The state through files, as it is after a crash."""
    weights, optimizer, progress = run.state()
    files.save_arrays(folder / "weights.safetensors", weights)
    files.save_arrays(folder / "optimizer.safetensors", optimizer)
    (folder / "progress.json").write_text(json.dumps(progress))
    return (
        files.load_arrays(folder / "weights.safetensors"),
        files.load_arrays(folder / "optimizer.safetensors"),
        json.loads((folder / "progress.json").read_text()),
    )


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_is_the_uninterrupted_one(base, data, tmp_path, step, changes):
    """Losses, rates, evaluations, weights and optimizer state agree to the last bit, dropout and all."""
    section = tiny.settings(max_steps=5, **changes)
    states = {}

    def keep(run):
        states[run.step] = run.state() if run.step != step else kept(run, tmp_path)

    whole = tiny.trainer(base, data, section, dropout=0.2, on_step=keep)
    tiny.drive(whole.run())

    mx.random.seed(99)
    resumed = tiny.trainer(base, data, section, dropout=0.2)
    resumed.resume(*states[step])
    assert resumed.step == step
    tiny.drive(resumed.run(), together=5)

    assert resumed.history.as_dict() == whole.history.as_dict()
    assert resumed.trained_tokens == whole.trained_tokens
    assert tiny.equal(resumed.tree.parameters(), whole.tree.parameters())
    assert tiny.equal(resumed.state()[1], whole.state()[1])


def test_a_kept_state_does_not_change_when_training_goes_on(base, data):
    """What `state` gave at a step is that step's, also after later ones."""
    states = []
    run = tiny.trainer(base, data, tiny.settings(), on_step=lambda t: states.append(t.state()))
    pieces = run.run()
    while not states:
        mx.eval(next(pieces).arrays)
    weights = {name: value + 0 for name, value in states[0][0].items()}
    mx.eval(weights)
    tiny.drive(pieces)
    assert tiny.equal(states[0][0], weights)
    assert not tiny.equal(run.tree.parameters(), weights)


def test_a_continued_lineage_is_one_long_run(base, data):
    """Two runs of two steps, the second from the first's weights and optimizer, make the updates of four steps."""
    seen = []
    long = tiny.trainer(base, data, tiny.settings(max_steps=4), on_step=lambda t: seen.append(t.state()))
    tiny.drive(long.run())

    parent = tiny.trainer(base, data, tiny.settings(max_steps=2))
    tiny.drive(parent.run())
    child = tiny.trainer(base, data, tiny.settings(max_steps=4))
    assert child.start_from(*parent.state()[:2])
    assert tiny.equal(child.tree.parameters(), parent.tree.parameters())
    child.step = 2  # the same rows as the long run's
    tiny.drive(child.run())
    assert tiny.losses(child) == tiny.losses(long)[2:]
    assert tiny.equal(child.tree.parameters(), long.tree.parameters())


def test_a_child_takes_up_its_own_rate(base, data):
    """The parent ended at a low rate: the child begins at that of its own first step."""
    section = tiny.settings(schedule="linear", max_steps=4)
    parent = tiny.trainer(base, data, section)
    tiny.drive(parent.run())
    child = tiny.trainer(base, data, section)
    child.start_from(*parent.state()[:2])
    tiny.drive(child.run())
    assert [row["lr"] for row in child.history.steps] == [row["lr"] for row in parent.history.steps]
    assert child.optimizer.step.item() == 8


def test_weights_alone_start_with_a_fresh_optimizer(base, data):
    """Without a kept optimizer, or with one of other shapes, weights go on and moments start at zero."""
    parent = tiny.trainer(base, data, tiny.settings())
    tiny.drive(parent.run())
    weights, optimizer, _ = parent.state()
    for state in (None, {"step": optimizer["step"]}):
        child = tiny.trainer(base, data, tiny.settings())
        assert not child.start_from(weights, state)
        assert tiny.equal(child.tree.parameters(), weights)
        moments = [value for name, value in child.state()[1].items() if name.endswith((".m", ".v"))]
        assert moments
        assert not any(value.any().item() for value in moments)
        tiny.drive(child.run())


def test_another_shape_is_refused(base, data):
    """Weights of another rank or of other modules are a `ModelError`, and the tree stays as it was."""
    child = tiny.trainer(base, data, tiny.settings())
    before = child.tree.parameters()
    for other in (tiny.tree(base, rank=2), tiny.tree(base, ["q_proj"])):
        with pytest.raises(ModelError):
            child.start_from(other.parameters(), None)
    assert tiny.equal(child.tree.parameters(), before)


def test_resuming_needs_the_optimizer(base, data):
    """A state without moments cannot be gone on from bit by bit: `resume` refuses it."""
    run = tiny.trainer(base, data, tiny.settings())
    tiny.drive(run.run())
    weights, _, progress = run.state()
    fresh: Trainer = tiny.trainer(base, data, tiny.settings())
    with pytest.raises(TrainingFailed):
        fresh.resume(weights, {}, progress)


def test_the_optimizer_state_holds_step_and_rate(base, data):
    """All of Adam's state is in the flat arrays, and `restore` puts all of it back."""
    run = tiny.trainer(base, data, tiny.settings())
    tiny.drive(run.run())
    arrays = state_arrays(run.optimizer)
    assert arrays["step"].item() == 3
    assert {"step", "learning_rate"} < arrays.keys()
    assert len(arrays) == 2 + 2 * len(run.tree.parameters())
    fresh = tiny.trainer(base, data, tiny.settings())
    assert restore(fresh.optimizer, fresh.tree.module.trainable_parameters(), arrays)
    assert tiny.equal(state_arrays(fresh.optimizer), arrays)
