"""Which earlier examples a lesson has disturbed most: measured while it is learnt, replayed from then on.

A lesson overwrites some of what came before and leaves the rest alone. Replaying all of it alike spends most rows on
what is still there; those with the highest loss by now are the ones to repeat (after maximally interfered retrieval:
Aljundi et al., arXiv 1908.04742; here the loss is measured as it has become, not as one step would change it).
"""

import math
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from .batches import as_batch, of_like_length, target_positions
from .encoding import Encoded
from .head import TargetRows
from .head_loss import CROSS_ENTROPY
from .step import Piece, losses_at_targets, noted
from .tree import TrainingTree

#: of all that is replayed, so much is the focus; but no fewer rows than this, nor than a step takes
HARDEST, AT_LEAST = 0.3, 16
#: tokens that are measured together
TOGETHER = 1024


def focus_steps(times: int, steps: int) -> list[int]:
    """After which of `steps` optimizer steps the earlier rows are measured: `times`, at even distances."""
    return [round(steps * (i + 1) / (times + 1)) for i in range(times)]


def hardest(losses: Sequence[float], at_least: int = AT_LEAST) -> list[int]:
    """Places of the rows with the highest losses, the highest first."""
    count = min(len(losses), max(at_least, AT_LEAST, math.ceil(HARDEST * len(losses))))
    return sorted(range(len(losses)), key=lambda i: (-losses[i], i))[:count]


def row_losses(
    tree: TrainingTree, head: TargetRows | None, rows: Sequence[Encoded], out: list[float]
) -> Iterator[Piece]:
    """Append to `out` the summed cross-entropy in nats of each of `rows`, in order, without dropout.

    They are rows that are learnt: what the tree's prefix makes of them is kept.
    """
    found = [0.0] * len(rows)
    for places in of_like_length(rows, TOGETHER):
        batch = as_batch([rows[i] for i in places])
        positions, targets = target_positions(batch)
        hidden: list[mx.array] = []
        if tree.prefix is not None:
            yield from tree.prefix.pieces(batch, hidden)
        with tree.quiet(*hidden):
            losses = losses_at_targets(tree, head, batch, CROSS_ENTROPY, [mx.array(targets)])
        yield from noted(tree)
        yield Piece([losses], barrier=True)
        row_of = positions // (batch[0].shape[1] - 1)
        sums = np.bincount(row_of, weights=np.array(losses), minlength=len(places))
        for i, value in zip(places, sums.tolist(), strict=True):
            found[i] = value
    out.extend(found)
