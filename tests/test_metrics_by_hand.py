"""What an update's own metrics are, reckoned by hand on a vocabulary of three tokens.

The model is a table of bigrams, and the adapter makes one token's row into another's, so that every probability is a
number that can be written down. The base says of what comes after token 0: 0.5, 0.3, 0.2; after 1: 0.1, 0.8, 0.1; after
2: 0.25, 0.25, 0.5. With the adapter, after 0 comes what came after 1.
"""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny

from radiance_mlx.engine.evaluating import UpdateEvaluation
from radiance_mlx.engine.foundation import Foundation
from radiance_mlx.evaluation.anchors import AnchorSet
from radiance_mlx.evaluation.plan import EarlierUpdate, Plan
from radiance_mlx.evaluation.policy import Rule
from radiance_mlx.lora.encoding import Encoded
from radiance_mlx.lora.targets import Targets
from radiance_mlx.lora.trainer import Trainer
from radiance_mlx.lora.tree import make_tree
from radiance_mlx.messages import Example

AFTER = [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]]
#: two answer tokens (1 after 0, 2 after 1) and one (0 after 0): by the adapter 0.8, 0.1 and 0.1
EXAMPLES = [Encoded((0, 1, 2), 1), Encoded((2, 0, 0), 2)]
#: -(ln 0.3 + ln 0.1 + ln 0.5) / 3 and -(ln 0.8 + ln 0.1 + ln 0.1) / 3, which is ln 5
LOSS_BEFORE, LOSS_AFTER = 1.3999017, 1.6094379
#: 0.5 ln(0.5 / 0.1) + 0.3 ln(0.3 / 0.8) + 0.2 ln(0.2 / 0.1)
KL_AFTER_0 = 0.6490995
#: nothing moves at this rate
MIX = Targets(("mix",), ("mix",), 0)
SETTINGS = tiny.settings(lr=1e-20, grad_accum=1, max_steps=3)


class Bigrams(nn.Module):
    """(rows, length) → (rows, length, 3) log-probabilities of what comes next."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 3)
        self.mix = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3, bias=False)
        self.embed.weight = self.mix.weight = mx.eye(3)
        self.head.weight = mx.log(mx.array(AFTER)).T
        self.layers = []
        self.freeze()

    def __call__(self, tokens):
        return self.head(self.mix(self.embed(tokens)))


@pytest.fixture
def base():
    return Bigrams()


def taught(base, settings=SETTINGS):
    """A trainer whose adapter turns token 0 into token 1 before the head."""
    tree = make_tree(base, MIX, rank=1, scale=2.0, dropout=0.0, seed=0)
    teach(tree)
    return Trainer(tree, None, EXAMPLES, settings, 1)


def teach(tree, strength=1.0):
    a, b = mx.array([[1.0], [0.0], [0.0]]), strength * mx.array([[-0.5, 0.5, 0.0]])
    tree.load({name: a if name.endswith("lora_a") else b for name in tree.parameters()})


def evaluation(base, **plan):
    """Of one update on that base; its anchors are the examples."""
    encoder = SimpleNamespace(example=lambda example, **_: EXAMPLES[int(example.text)])
    model = SimpleNamespace(module=base, vocab_size=3, fingerprint="three")
    anchors = AnchorSet(tuple(EXAMPLES), "by hand", "0", 0)
    foundation = Foundation(model, MIX, encoder, Path(plan.pop("home")))
    return UpdateEvaluation(foundation, Plan(Rule("off", "forgetting_kl", 1.0), anchors, **plan), SETTINGS)


def test_the_losses_of_steps_and_of_the_whole_are_means_over_answer_tokens(base):
    """`finetune_loss`: ln 5, in each step, where the rows share a micro-batch, and at the end."""
    run, final = taught(base), []
    tiny.drive(run.run())
    tiny.drive(run.evaluate_all(final))
    assert tiny.losses(run) == pytest.approx([LOSS_AFTER] * 3, abs=1e-6)
    assert final == pytest.approx([LOSS_AFTER], abs=1e-6)


def test_a_steps_loss_is_the_mean_over_its_micro_batches(base):
    """As mlx-lm trains it: (-(ln 0.8 + ln 0.1) / 2 - ln 0.1) / 2 where each row is one; of all, tokens count alike."""
    run, final = taught(base, tiny.settings(lr=1e-20, batch_size=1, grad_accum=2, max_steps=2)), []
    tiny.drive(run.run())
    tiny.drive(run.evaluate_all(final))
    assert tiny.losses(run) == pytest.approx([(1.2628643 + 2.3025851) / 2] * 2, abs=1e-6)
    assert final == pytest.approx([LOSS_AFTER], abs=1e-6)


def test_eval_loss_is_of_the_rows_that_are_held_out(base):
    """-(ln 0.8 + ln 0.1) / 2 or -ln 0.1, whichever row it is; and of the batch itself where none is."""
    settings = tiny.settings(lr=1e-20, grad_accum=1, max_steps=4, eval_every=1, eval_fraction=0.5, eval_holdout=True)
    run = taught(base, settings=settings)
    tiny.drive(run.run())
    expected = {EXAMPLES[0]: 1.2628643, EXAMPLES[1]: 2.3025851}[run.holdout.held[0]]
    assert [row["loss"] for row in run.history.evals] == pytest.approx([expected] * len(run.history.evals), abs=1e-6)
    assert run.held_out_loss == pytest.approx(expected, abs=1e-6)

    run = taught(base, settings=tiny.settings(lr=1e-20, grad_accum=1, max_steps=3, eval_every=1))
    tiny.drive(run.run())
    assert [row["loss"] for row in run.history.evals] == pytest.approx([LOSS_AFTER] * 2, abs=1e-6)


def test_update_metrics_are_what_a_hand_computes(base, tmp_path):
    """`update_kl`: two of three answer tokens come after 0. `update_retention`: of two earlier updates, the first had
    gained from 1.7 to 1.2 on the first example, the second from 2.5 to 2 on the second.
    """
    earlier = tuple(
        EarlierUpdate(name, (Example(text=str(number)),), before, after)
        for number, (name, before, after) in enumerate([("A_1", 1.7, 1.2), ("A_2", 2.5, 2.0)])
    )
    run, found = taught(base), evaluation(base, home=tmp_path, earlier=earlier)
    teach(run.tree, 0.0)
    tiny.drive(found.before(run, EXAMPLES, None))
    teach(run.tree)
    tiny.drive(found.after(run, None, "A_3", None, LOSS_AFTER))
    metrics = found.metrics
    assert metrics["update_kl"] == pytest.approx(2 * KL_AFTER_0 / 3, abs=1e-6)
    kept = {"A_1": (1.7 - 1.2628643) / 0.5, "A_2": (2.5 - 2.3025851) / 0.5}
    assert metrics["update_retention_by_checkpoint"] == pytest.approx(kept, abs=1e-5)
    assert metrics["update_retention"] == pytest.approx((0.8742714 + 0.3948298) / 2, abs=1e-5)
    own = {"sample": 8, "loss_before": LOSS_BEFORE, "loss_after": LOSS_AFTER}
    assert metrics["own_sample"] == pytest.approx(own, abs=1e-6)
    # the anchors are the same rows, and the parent is the base
    for name in ("forgetting_kl", "drift_kl", "forgetting_loss_delta"):
        assert metrics[name] == pytest.approx(2 * KL_AFTER_0 / 3, abs=1e-6)
    assert metrics["anchor_ce_delta"] == pytest.approx(LOSS_AFTER - LOSS_BEFORE, abs=1e-6)
    # entropies 1.0296530 after 0 (twice) and 0.6390319 after 1
    assert metrics["forgetting_loss"] == pytest.approx((2 * (1.0296530 + KL_AFTER_0) + 0.6390319) / 3, abs=1e-6)
    assert metrics["base_agreement"] == pytest.approx(1 / 3, abs=1e-6)
