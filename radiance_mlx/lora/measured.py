"""The loss of rows as it is, without dropout: what curves and final figures are made of."""

import math
from collections.abc import Iterator, Sequence

import mlx.core as mx

from ..errors import NonFinite
from .batches import batches_once
from .encoding import Encoded
from .step import LossFunction, Piece, noted
from .tree import TrainingTree


def mean_loss(
    tree: TrainingTree,
    loss: LossFunction,
    examples: Sequence[Encoded],
    out: list[float],
    *,
    batch_size: int,
    max_tokens: int,
    own: bool,
) -> Iterator[Piece]:
    """Append to `out` the mean cross-entropy in nats over all target tokens of `examples`.

    `own` ones are learnt here: what the tree's prefix makes of them is kept.
    """
    total, count = 0.0, 0
    for batch in batches_once(examples, batch_size=batch_size, max_tokens=max_tokens):
        hidden: list[mx.array] = []
        if own and tree.prefix is not None:
            yield from tree.prefix.pieces(batch, hidden)
        with tree.quiet(*hidden):
            value, tokens = loss(tree.module, *batch)
        yield from noted(tree)
        yield Piece([value], barrier=True)
        weight = int(tokens)
        total, count = total + value.item() * weight, count + weight
    out.append(total / count)


def require_finite(loss: float, norm: float, step: int) -> None:
    """Raises `NonFinite` for a `loss` or gradient `norm` that is no number: step `step` (from 1) ruins the weights."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = "loss" if not math.isfinite(loss) else "gradient"
    raise NonFinite(
        f"The {what} became non-finite at step {step} (loss {loss}, gradient norm {norm}).",
        "Lower training.lr, or keep training.clip_norm at 1.0; nothing was published.",
        {"step": step},
    )
