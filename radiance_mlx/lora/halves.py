"""A micro-batch as two halves that are computed side by side, each by one thread of OpenBLAS.

OpenBLAS divides a product among its threads, but all that is no product (norms, attention's softmax, activations)
MLX computes on one thread for each stream: on a CPU, the second core waits. Two halves of the rows on two streams use
both all the time (docs/benchmarks.md). Sums are those of the whole but for their order.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import blas
from .batches import target_positions
from .targets import LINEAR, input_dims

#: threads of OpenBLAS with which it was measured
MEASURED = 2
#: tokens of a micro-batch, padding included; of fewer, the second graph takes longer to build than is won
FEWEST = 256
#: the same for models whose layers have so many weights, in the mean: there is more to compute in that time
FEWEST_OF_LARGE, LARGE = 176, 2_000_000


def halves_here() -> bool:
    """Whether two halves are computed faster than the whole on the default device."""
    return blas.threads() == MEASURED and blas.can_use_fewer() and mx.default_device() == mx.cpu


def halved(setting: str) -> bool:
    """Whether `setting`, auto or off, means halves on the default device."""
    return setting == "auto" and halves_here()


Pair = tuple[mx.Stream, mx.Stream]


class _Streams(threading.local):
    """Of one thread: a pair that only it may use, one that any thread may, and that of now, if it is not the first."""

    own: Pair | None = None
    shared: Pair | None = None
    now: Pair | None = None


_streams = _Streams()


def streams() -> Pair:
    """Two streams of the CPU for what this thread builds now: its own one and another, or those of `shared`."""
    if _streams.now is not None:
        return _streams.now
    if _streams.own is None:
        _streams.own = (mx.default_stream(mx.cpu), mx.new_stream(mx.cpu))
    return _streams.own


@contextlib.contextmanager
def shared(*, aside: bool) -> Iterator[None]:
    """Inside, what is built may be evaluated by any thread, by one at a time; `aside`, all of it on a single stream."""
    if _streams.shared is None:
        _streams.shared = (mx.new_thread_unsafe_stream(mx.cpu), mx.new_thread_unsafe_stream(mx.cpu))
    first, second = _streams.shared
    before, _streams.now = _streams.now, (second, second) if aside else (first, second)
    try:
        with mx.stream(_streams.now[0]):
            yield
    finally:
        _streams.now = before


def wait() -> None:
    """Until nothing that this thread has begun is under way any more, on any stream. Raises what went wrong with it."""
    for stream in _all():
        mx.synchronize(stream)


def forget() -> None:
    """As `wait`, but for what went wrong: nobody wants it any more."""
    for stream in _all():
        with contextlib.suppress(RuntimeError):
            mx.synchronize(stream)


def _all() -> list[mx.Stream]:
    return [mx.default_stream(mx.default_device()), *(_streams.own or ()), *(_streams.shared or ())]


def fewest_tokens(module: nn.Module) -> int:
    """Of a micro-batch that pays in halves, for this model: by its linears' weights, in the mean of all layers."""
    linears = [m for layer in module.layers for m in layer.modules() if isinstance(m, LINEAR)]
    weights = sum(m.weight.shape[0] * input_dims(m) for m in linears)
    return FEWEST_OF_LARGE if weights >= LARGE * len(module.layers) else FEWEST


def in_halves(batch: Sequence[Any], fewest: int) -> list[tuple[Any, ...]]:
    """Both halves of the rows of `batch`; none of fewer tokens than `fewest`, or if one would be without a target.

    `batch` is tokens (rows, length + 1), spans (rows, 2), arrays of its targets, row after row, and plain values.
    """
    tokens, spans, *others = batch
    if tokens.shape[0] * (tokens.shape[1] - 1) < fewest:
        return []
    middle = tokens.shape[0] // 2
    parts = [(tokens[:middle], spans[:middle]), (tokens[middle:], spans[middle:])]
    counts = [len(target_positions(part)[1]) if part[0].shape[0] else 0 for part in parts]
    if not all(counts):
        return []
    targets = (slice(counts[0]), slice(counts[0], None))
    mine = [[x[own] if isinstance(x, mx.array) else x for x in others] for own in targets]
    return [(*part, *rest) for part, rest in zip(parts, mine, strict=True)]
