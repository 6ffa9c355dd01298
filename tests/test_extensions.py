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


def extensions(job):
    """What its notes say of them."""
    return [note for note in job.notes if note.startswith("not learnt in ")]


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


def test_the_sample_of_each_evaluation_goes_on_in_an_extension(base):
    """A curve as that of a longer run: after each `eval_every` steps but the last."""
    run, _ = run_with(base, 0.06, extensions=1, learnt_loss=0.05, eval_every=2)
    assert [row["step"] for row in run.history.evals] == [2, 4, 6, 8, 10]


def test_a_run_that_is_taken_up_again_knows_its_extensions(base):
    """And for which losses it had them."""
    run, _ = run_with(base, 0.06, extensions=2, learnt_loss=0.05)
    again = tiny.trainer(base, tiny.examples(6), run.settings)
    again.resume(*run.state())
    assert again.total_steps == 18
    assert again.holdout.extended == [0.06, 0.06]
    assert not again.extend(0.06)


def test_an_update_that_is_not_learnt_is_extended_and_says_so(tmp_path):
    """Its curve has all steps, and its notes each extension."""
    flags = {**QUICK, "training.max_steps": 4, "training.extensions": 2, "training.learnt_loss": NEVER}
    with running(tmp_path, flags) as service:
        job = service.wait(service.post(FACTS[0]), "published")
        assert [note.split(" (")[0] for note in extensions(job)] == ["not learnt in 4 steps", "not learnt in 8 steps"]
        assert all(note.endswith(": 4 more") for note in extensions(job))
        metrics = json.loads((tmp_path / "metrics" / f"{job.checkpoint}.json").read_text())
        assert len(metrics["curves"]["finetune_loss"]) == 12
    with running(tmp_path, flags, training__learnt_loss=ALWAYS) as service:
        assert not extensions(service.wait(service.post(FACTS[1]), "published"))


def test_the_loss_that_counts_is_that_of_what_answers_and_what_learns_is_whole(tmp_path, monkeypatch):
    """With the adapter merged toward the base; an extension trains at the scale of the first steps."""
    scales, step = [], Trainer._timed_step

    def noted(self, *batches):
        scales.append(next(m.scale for m in self.tree.module.modules() if hasattr(m, "lora_a")))
        return step(self, *batches)

    monkeypatch.setattr(Trainer, "_timed_step", noted)
    flags = {**QUICK, "training.max_steps": 10, "training.batch_size": 4, "lineage": "fresh"}
    losses = {}
    for part in (1.0, 0.2):
        with running(tmp_path / str(part), flags, serving__merge_toward_base=part) as service:
            checkpoint = service.learn(FACTS[0])
            losses[part] = service.checkpoints()[checkpoint].metrics["finetune_loss"]
    assert losses[1.0] < losses[0.2]
    between = (losses[1.0] + losses[0.2]) / 2
    scales.clear()
    more = {"training.extensions": 1, "training.learnt_loss": between, "serving.merge_toward_base": 0.2}
    with running(tmp_path / "extended", {**flags, **more}) as service:
        assert extensions(service.wait(service.post(FACTS[0]), "published"))
    assert len(scales) == 20
    assert len(set(scales)) == 1


def test_an_interrupted_extension_goes_on_bit_by_bit(tmp_path):
    """Stopped in its middle; its notes tell of all extensions."""
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
            weights = (service.folder(found.checkpoint) / "adapters.safetensors").read_bytes()
            made[name] = (weights, extensions(found))
            assert any("taken up again" in note for note in found.notes) is cut
    assert made["whole"] == made["cut"]
    assert len(made["cut"][1]) == 2


def test_steps_that_somebody_has_counted_are_not_extended(tmp_path):
    """Those of a fine-tuning job's epochs, and of a reconsolidation; nor does mlx-lm's own loop know of it."""
    config = load_config(home=tmp_path, environ={}, flags={"training.extensions": 2}).config
    batch = TrainBatch(checkpoint="A", number=1, parent=None, jobs=(), examples=(Example(text="t"),), data_hash="")
    assert fitted(config, batch, 512).training.extensions == 2
    assert fitted(config, replace(batch, terms=Terms(epochs=3)), 512).training.extensions == 0
    assert fitted(config, replace(batch, reconsolidated=True), 512).training.extensions == 0
    with pytest.raises(ConfigError, match="extensions"):
        load_config(home=tmp_path, environ={}, flags={"training.extensions": 2, "training.slice_ms": 0})
