"""`replay.refocus`: of the earlier rows, those that the lesson has disturbed most are replayed from then on."""

import itertools
import json

import numpy as np
import pytest
import tiny
from mlx_lm.tuner.trainer import default_loss

from radiance_mlx.lora.batches import batches_once
from radiance_mlx.lora.encoding import Encoded
from radiance_mlx.lora.focus import AT_LEAST, focus_steps, hardest, row_losses
from radiance_mlx.lora.head import install_head
from radiance_mlx.lora.replay import Replay, replay_stream
from radiance_mlx.lora.trainer import Trainer

EARLIER = tiny.examples(40, seed=7, longest=20)


@pytest.fixture(scope="module")
def base():
    return tiny.model()


def make_trainer(base, section, refocus, on_step=lambda trainer: None):
    tree = tiny.tree(base, dropout=0.2)
    replay = Replay(EARLIER, 0.5, refocus)
    return Trainer(tree, install_head(tree.module, tiny.VOCAB), tiny.examples(5), section, 1, on_step, replay=replay)


@pytest.mark.parametrize("full_head", [False, True])
def test_the_loss_of_each_row_is_mlx_lms(base, full_head):
    """Whatever company a row is measured in, rows without a target included; in the rows' order."""
    tree, rows, out = tiny.tree(base, dropout=0.5), [*EARLIER, Encoded((1, 2), 2)], []
    head = None if full_head else install_head(tree.module, tiny.VOCAB)
    tiny.drive(row_losses(tree, head, rows, out), together=3)
    tree.module.eval()
    expected = []
    for row in EARLIER:
        (batch,) = batches_once([row], batch_size=1, max_tokens=64)
        expected.append(default_loss(tree.module, *batch)[0].item() * row.targets)
    assert out == [*(pytest.approx(value, rel=1e-4) for value in expected), 0.0]


def test_they_are_measured_at_even_distances():
    assert focus_steps(0, 60) == []
    assert focus_steps(2, 60) == [20, 40]
    assert focus_steps(3, 10) == [2, 5, 8]


def test_the_hardest_come_first_and_are_no_fewer_than_a_step_takes():
    losses = [float(i % 50) for i in range(100)]
    assert hardest(losses)[:4] == [49, 99, 48, 98]
    assert len(hardest(losses)) == 30
    assert len(hardest(losses, at_least=64)) == 64
    assert sorted(hardest(losses[:5])) == [0, 1, 2, 3, 4]
    assert len(hardest(losses[:40])) == AT_LEAST


def test_from_then_on_only_those_come():
    """New rows go on as they would have; before, all earlier ones come in their own order."""
    new = [Encoded((90 + i, 4, 5), 1) for i in range(3)]
    earlier = [Encoded((10 + i, 4, 5), 1) for i in range(30)]

    def rows(focuses):
        stream = replay_stream(
            new, Replay(earlier, 0.5), batch_size=4, accumulate=1, max_tokens=8, seed=(0, 1), focuses=focuses
        )
        return [sorted(np.array(tokens)[:, 0].tolist()) for tokens, _ in itertools.islice(stream, 8)]

    plain, focused = rows({}), rows({3: [5, 6], 6: [7, 8, 9]})
    assert focused[:3] == plain[:3]
    assert [[t for t in row if t >= 90] for row in focused] == [[t for t in row if t >= 90] for row in plain]
    later = [[t - 10 for t in row if t < 90] for row in focused[3:]]
    assert later == [[5, 6], [5, 6], [5, 6], [7, 8], [7, 9]]


def test_a_run_measures_and_then_replays_the_hardest(base):
    """What is trained after a measurement is what had the highest loss by then."""
    section = tiny.settings(max_steps=6, batch_size=4, grad_accum=1)
    run = make_trainer(base, section, refocus=1)
    tiny.drive(itertools.takewhile(lambda _: run.step < 3 or not run._focuses, run.run()))
    [(step, places)] = run._focuses.items()
    losses = []
    tiny.drive(row_losses(run.tree, None, EARLIER, losses))
    assert step == 3
    assert min(losses[i] for i in places) >= max(losses[i] for i in range(len(losses)) if i not in places) - 1e-4


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_a_resumed_run_is_the_uninterrupted_one(base, step):
    """Also one that was interrupted between a measurement and the next: losses and weights to the last bit."""
    states, section = {}, tiny.settings(max_steps=9)

    def keep(run):
        weights, optimizer, progress = run.state()
        states[run.step] = weights, optimizer, json.loads(json.dumps(progress))

    whole = make_trainer(base, section, 2, keep)
    tiny.drive(whole.run())
    resumed = make_trainer(base, section, 2)
    resumed.resume(*states[step])
    tiny.drive(resumed.run(), together=3)
    assert resumed.history.as_dict() == whole.history.as_dict()
    assert tiny.equal(resumed.tree.parameters(), whole.tree.parameters())
    assert resumed._focuses == whole._focuses
    assert sorted(whole._focuses) == [3, 6]
