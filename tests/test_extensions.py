"""`training.extensions`: a batch that is not learnt in its steps has as many once more."""

import itertools
import json
from dataclasses import replace

import pytest
import tiny
from running import FACTS, QUICK, running

from radiance_mlx.config import load_config
from radiance_mlx.engine.preparing import fitted
from radiance_mlx.errors import ConfigError
from radiance_mlx.lora.replay import Replay
from radiance_mlx.lora.trainer import Trainer
from radiance_mlx.messages import Example, Terms, TrainBatch

#: a loss that is never reached, and one that always is
NEVER, ALWAYS = 1e-9, 100.0


@pytest.fixture(scope="module")
def base():
    return tiny.model()


def run_with(base, loss, **changes):
    """A trainer that is told `loss` after each run, until it is done; steps after each."""
    section = tiny.settings(max_steps=6, schedule="linear", **changes)
    run, steps = tiny.trainer(base, tiny.examples(6), section), []
    for _ in range(10):
        tiny.drive(run.run())
        steps.append(run.step)
        if not run.extend(loss):
            return run, steps
    raise AssertionError("it never ends")


def test_what_is_not_learnt_is_trained_on_at_the_same_rates_again(base):
    """At most so many times; the rows go on in the order of a longer run, and the steps that are told are all."""
    run, steps = run_with(base, 0.06, extensions=2, learnt_loss=0.05)
    assert steps == [6, 12, 18]
    rates = [row["lr"] for row in run.history.steps]
    assert rates[6:12] == rates[12:] == rates[:6]
    assert run.total_steps == 18
    longer = tiny.trainer(base, tiny.examples(6), tiny.settings(max_steps=18))
    mine, theirs = (itertools.islice(r.micro_batches(), 36) for r in (run, longer))
    assert [a[0].tolist() for a in mine] == [b[0].tolist() for b in theirs]


@pytest.mark.parametrize("changes", [{}, {"extensions": 3, "learnt_loss": 0.07}, {"extensions": 3, "stop_loss": 50.0}])
def test_what_is_learnt_is_left_alone(base, changes):
    """And what has been stopped; and nothing is extended by default."""
    run, steps = run_with(base, 0.06, **changes)
    assert len(steps) == 1
    assert run.total_steps == 6


def test_held_out_rows_that_are_learnt_in_the_end_leave_no_room_for_it(base):
    """Their phase has come, and what it found out about them would not hold; those that stay out do."""
    options = {"extensions": 1, "learnt_loss": 0.05, "eval_fraction": 0.5, "eval_every": 2}
    assert run_with(base, 0.06, **options)[1] == [6]
    assert run_with(base, 0.06, **options, eval_holdout=True)[1] == [6, 12]


def test_refocusing_goes_on_in_an_extension(base):
    """At the same places of the schedule."""
    section = tiny.settings(max_steps=6, extensions=1, learnt_loss=0.05)
    rows = tiny.examples(20, seed=3)
    made = tiny.trainer(base, tiny.examples(6), section)
    run = Trainer(made.tree, None, tiny.examples(6), section, 1, replay=Replay(rows, 0.5, 2))
    tiny.drive(run.run())
    assert sorted(run._focuses) == [2, 4]
    assert run.extend(1.0)
    tiny.drive(run.run())
    assert sorted(run._focuses) == [2, 4, 8, 10]


def test_an_update_that_is_not_learnt_is_extended_and_says_so(tmp_path):
    """Its curve has all steps, and its notes each extension; the loss that counts is that of what answers."""
    flags = {**QUICK, "training.max_steps": 4, "training.extensions": 2, "training.learnt_loss": NEVER}
    with running(tmp_path, flags) as service:
        job = service.wait(service.post(FACTS[0]), "published")
        assert any(note.startswith("not learnt in 4 steps (loss ") for note in job.notes)
        assert sum(note.endswith(": 4 more") for note in job.notes) == 2
        metrics = json.loads((tmp_path / "metrics" / f"{job.checkpoint}.json").read_text())
        assert len(metrics["curves"]["finetune_loss"]) == 12
    with running(tmp_path, flags, training__learnt_loss=ALWAYS) as service:
        job = service.wait(service.post(FACTS[1]), "published")
        assert not any("more" in note for note in job.notes)


def test_an_interrupted_extension_goes_on_bit_by_bit(tmp_path):
    """Stopped in its middle, the batch knows how many it has had."""
    flags = {**QUICK, "training.max_steps": 20, "training.extensions": 2, "training.learnt_loss": NEVER}
    made = {}
    for name, cut in [("whole", False), ("cut", True)]:
        home = tmp_path / name
        with running(home, flags) as service:
            job = service.post(FACTS[0])
            if cut:
                service.wait_for_step(23, job)
            else:
                service.wait(job, "published")
        with running(home, flags) as service:
            found = service.wait(job, "published")
            made[name] = (service.folder(found.checkpoint) / "adapters.safetensors").read_bytes()
            assert any("taken up again" in note for note in found.notes) is cut
    assert made["whole"] == made["cut"]


def test_steps_that_somebody_has_counted_are_not_extended(tmp_path):
    """Those of a fine-tuning job's epochs, and of a reconsolidation; nor does mlx-lm's own loop know of it."""
    config = load_config(home=tmp_path, environ={}, flags={"training.extensions": 2}).config
    batch = TrainBatch(checkpoint="A", number=1, parent=None, jobs=(), examples=(Example(text="t"),), data_hash="")
    assert fitted(config, batch, 512).training.extensions == 2
    assert fitted(config, replace(batch, terms=Terms(epochs=3)), 512).training.extensions == 0
    assert fitted(config, replace(batch, reconsolidated=True), 512).training.extensions == 0
    with pytest.raises(ConfigError, match="extensions"):
        load_config(home=tmp_path, environ={}, flags={"training.extensions": 2, "training.slice_ms": 0})
