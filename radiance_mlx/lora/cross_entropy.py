"""Cross-entropy through a frozen head, its gradient found while the loss is.

What the loss needs of the logits is two numbers for each row, and what training needs is the gradient for the
head's input: both are known as soon as a chunk of logits is, so no logits outlive their chunk. That spares the
memory of all rows' logits and their gradients, and the second exponential of each (the softmax serves both).
"""

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

#: logits of one chunk: on a CPU about as many as its caches bear, elsewhere enough for a product worth its start
CHUNK_ON_CPU, CHUNK_ELSEWHERE = 2**20, 2**25


def chunk_rows(vocab_size: int) -> int:
    """Of how many rows the logits are there at a time."""
    return max(1, (CHUNK_ON_CPU if mx.default_device() == mx.cpu else CHUNK_ELSEWHERE) // vocab_size)


def head_losses(
    hidden: mx.array,
    targets: np.ndarray,
    project: Callable[[mx.array], mx.array],
    vocab_size: int,
    note: Callable[[mx.array], None],
    *,
    with_gradient: bool,
) -> mx.array:
    """The cross-entropy in nats of each row, (rows,) float32: -log softmax(project(hidden))[target].

    `hidden` is (rows, dims), `project` a frozen map of each row to its logits (rows, vocab_size). `note` is called
    with arrays that may be evaluated one after the other. The gradient is found only with `with_gradient`.
    """
    size = chunk_rows(vocab_size)

    def chunks(hidden: mx.array) -> Iterator[_Chunk]:
        for start in range(0, len(targets), size):
            yield _Chunk(hidden[start : start + size], mx.array(targets[start : start + size]), project)

    if not with_gradient:
        losses = [chunk.losses() for chunk in chunks(hidden)]
        for each in losses:
            note(each)
        return mx.concatenate(losses)

    def forward(hidden: mx.array) -> mx.array:
        both = [chunk.losses_and_gradients() for chunk in chunks(hidden)]
        for each in both:
            note(each)
        return mx.concatenate(both)

    def backward(hidden: mx.array, above: mx.array, both: mx.array) -> mx.array:
        return (above[:, :1] * both[:, 1:]).astype(hidden.dtype)

    function = mx.custom_function(forward)
    function.vjp(backward)
    return function(hidden)[:, 0]


class _Chunk:
    """Some rows: hidden (rows, dims) and targets (rows,)."""

    def __init__(self, hidden: mx.array, targets: mx.array, project: Callable[[mx.array], mx.array]) -> None:
        self._hidden, self._targets, self._project = hidden, targets, project
        self._logits = project(hidden)
        self._wide = self._logits.astype(mx.float32)

    def losses(self) -> mx.array:
        return mx.logsumexp(self._wide, axis=-1) - self._of_targets()

    def _of_targets(self) -> mx.array:
        return mx.take_along_axis(self._wide, self._targets[:, None], axis=-1)[:, 0]

    def losses_and_gradients(self) -> mx.array:
        """(rows, 1 + dims) float32: each row's loss and its gradient, for which one exponential serves.

        In one array: with either still to be computed, the logits would stay.
        """
        shares = mx.softmax(self._wide, axis=-1)
        # the largest share is at least 1 / vocabulary, so that its logarithm is safe
        whole = self._wide.max(axis=-1) - mx.log(shares.max(axis=-1))
        losses = whole - self._of_targets()
        shares = shares.at[mx.arange(len(self._targets)), self._targets].subtract(1.0)
        _, [gradients] = mx.vjp(self._project, [self._hidden], [shares.astype(self._logits.dtype)])
        return mx.concatenate([losses[:, None], gradients.astype(mx.float32)], axis=-1)
