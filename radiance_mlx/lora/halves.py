"""A micro-batch as two halves that are computed side by side, each by one thread of OpenBLAS.

OpenBLAS divides a product among its threads, but all that is no product (norms, attention's softmax, activations)
MLX computes on one thread for each stream: on a CPU, the second core waits. Two halves of the rows on two streams use
both all the time (docs/benchmarks.md). Sums are those of the whole but for their order.
"""

import threading
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .. import blas
from .batches import target_positions

#: threads of OpenBLAS with which it was measured
MEASURED = 2
#: tokens of a micro-batch, padding included; of fewer, the second graph takes longer to build than is won
FEWEST = 256


def halves_here() -> bool:
    """Whether two halves are computed faster than the whole on the default device."""
    return blas.threads() == MEASURED and blas.can_use_fewer() and mx.default_device() == mx.cpu


def halved(setting: str) -> bool:
    """Whether `setting`, auto or off, means halves on the default device."""
    return setting == "auto" and halves_here()


class _Streams(threading.local):
    """Those of one thread: no other may use them."""

    pair: tuple[mx.Stream, mx.Stream] | None = None


_streams = _Streams()


def streams() -> tuple[mx.Stream, mx.Stream]:
    """Two streams of the CPU that this thread may use: its own one, and another."""
    if _streams.pair is None:
        _streams.pair = (mx.default_stream(mx.cpu), mx.new_stream(mx.cpu))
    return _streams.pair


def wait() -> None:
    """Until nothing that this thread has begun is under way any more, on either stream."""
    mx.synchronize()
    for stream in _streams.pair or ():
        mx.synchronize(stream)


def in_halves(batch: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Both halves of the rows of `batch`; none if that does not pay, or one would be without a target.

    `batch` is tokens (rows, length + 1), spans (rows, 2), arrays of its targets, row after row, and plain values.
    """
    tokens, spans, *others = batch
    if tokens.shape[0] * (tokens.shape[1] - 1) < FEWEST:
        return []
    middle = tokens.shape[0] // 2
    parts = [(tokens[:middle], spans[:middle]), (tokens[middle:], spans[middle:])]
    counts = [len(target_positions(part)[1]) if part[0].shape[0] else 0 for part in parts]
    if not all(counts):
        return []
    targets = (slice(counts[0]), slice(counts[0], None))
    mine = [[x[own] if isinstance(x, mx.array) else x for x in others] for own in targets]
    return [(*part, *rest) for part, rest in zip(parts, mine, strict=True)]
