"""Losses through a frozen head, their gradient found while they are.

What a loss needs of a row's logits are a few numbers, and what training needs is the gradient for the head's input:
both are known as soon as a chunk of logits is, so no logits outlive their chunk. That spares the memory of all rows'
logits and of their gradients, and the second exponential of each (one softmax serves both).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Project = Callable[[mx.array], mx.array]
#: logits of one chunk: on a CPU about as many as its caches bear, elsewhere enough for a product worth its start
CHUNK_ON_CPU, CHUNK_ELSEWHERE = 2**20, 2**25
#: rows of a chunk at least: the head's own weights are read for each
FEWEST = 32


def chunk_rows(vocab_size: int) -> int:
    """Of how many rows the logits are there at a time."""
    return max(FEWEST, (CHUNK_ON_CPU if mx.default_device() == mx.cpu else CHUNK_ELSEWHERE) // vocab_size)


@dataclass(frozen=True)
class RowLoss:
    """A loss of each row, of its logits (rows, vocabulary) float32 and of what else is known of it, (rows, …) each.

    `alone` gives the losses (rows,), `with_slope` them and their gradients for the logits.
    """

    alone: Callable[..., mx.array]
    with_slope: Callable[..., tuple[mx.array, mx.array]]


def _cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


def _cross_entropy_with_slope(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    shares = mx.softmax(logits, axis=-1)
    losses = log_of_sum(logits, shares) - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return losses, shares.at[mx.arange(len(targets)), targets].subtract(1.0)


def log_of_sum(logits: mx.array, shares: mx.array) -> mx.array:
    """`logsumexp` of each row whose softmax is known: the largest share is at least 1 / V, and has a logarithm."""
    return logits.max(axis=-1) - mx.log(shares.max(axis=-1))


#: -log softmax(logits)[target], in nats
CROSS_ENTROPY = RowLoss(_cross_entropy, _cross_entropy_with_slope)


def head_losses(
    loss: RowLoss,
    hidden: mx.array,
    known: Sequence[mx.array],
    project: Project,
    vocab_size: int,
    note: Callable[[mx.array], None],
    *,
    with_gradient: bool,
) -> mx.array:
    """`loss` of each row, (rows,) float32, where `project` maps `hidden` (rows, dims) to logits (rows, vocab_size).

    `project` must be frozen. `note` is called with arrays that may be evaluated one after the other. The gradient for
    `hidden` is found only with `with_gradient`.
    """
    size = chunk_rows(vocab_size)

    def chunks(hidden: mx.array) -> Iterator[tuple[mx.array, list[mx.array]]]:
        for start in range(0, hidden.shape[0], size):
            yield hidden[start : start + size], [rows[start : start + size] for rows in known]

    if not with_gradient:
        losses = [loss.alone(project(part).astype(mx.float32), *rows) for part, rows in chunks(hidden)]
        for each in losses:
            note(each)
        return mx.concatenate(losses)

    def forward(hidden: mx.array) -> mx.array:
        both = [_losses_and_gradients(loss, part, rows, project) for part, rows in chunks(hidden)]
        for each in both:
            note(each)
        return mx.concatenate(both)

    def backward(hidden: mx.array, above: mx.array, both: mx.array) -> mx.array:
        return (above[:, :1] * both[:, 1:]).astype(hidden.dtype)

    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    return function(hidden)[:, 0]


def _losses_and_gradients(loss: RowLoss, hidden: mx.array, known: Sequence[mx.array], project: Project) -> mx.array:
    """(rows, 1 + dims) float32: each row's loss and its gradient.

    In one array: with either still to be computed, the logits would stay.
    """
    logits = project(hidden)
    losses, slopes = loss.with_slope(logits.astype(mx.float32), *known)
    _, [gradients] = mx.vjp(project, [hidden], [slopes.astype(logits.dtype)])
    return mx.concatenate([losses[:, None], gradients.astype(mx.float32)], axis=-1)
