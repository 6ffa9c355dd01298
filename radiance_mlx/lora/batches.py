"""Micro-batches in a reproducible order, by mlx-lm's own `iterate_batches`, with less padding than it gives them.

The order is a function of (seed, batch number, epoch) alone, so a job taken up again goes on with the very
rows that would have come. Every example comes once per epoch; the last, short batch is filled up with
examples drawn at random, since mlx-lm would drop its rows (always the longest ones).

Rows that come from several places (see `replay` and `rehearsal`) are taken in `turns`, each place's own in a
`shuffled` order.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches

from ..config.schema import TrainingSection
from .encoding import Encoded

#: a micro-batch's inputs are as long as its longest row's, rounded up to a multiple of this. (mlx-lm's 32 spares its
#: compiled step new shapes; these steps are not compiled, and rows of 27 tokens would cost an eighth more.)
WIDTHS, COMPILED_WIDTHS = 4, 32
#: tokens (rows, length + 1) int32, and (rows, 2) int32: first and last target index of each row
Batch = tuple[mx.array, mx.array]


def fit_to_data(settings: TrainingSection, examples: int) -> TrainingArgs:
    """mlx-lm's `TrainingArgs`, cut down for a batch with fewer examples than one optimizer step takes.

    Repeating rows within one step would cost time and change nothing: the mean gradient is the same.
    """
    batch_size = min(settings.batch_size, examples)
    accumulate = min(settings.grad_accum, math.ceil(examples / batch_size))
    return TrainingArgs(
        batch_size=batch_size,
        iters=settings.max_steps * accumulate,
        grad_accumulation_steps=accumulate,
        max_seq_length=settings.max_seq_length,
        grad_checkpoint=settings.grad_checkpoint,
        val_batches=0,
        steps_per_report=accumulate,
        steps_per_save=settings.max_steps * accumulate + 1,
    )


def batch_stream(
    examples: Sequence[Encoded], *, batch_size: int, max_tokens: int, seed: tuple[int, int], widths: int = WIDTHS
) -> Iterator[Batch]:
    """Micro-batches without end. `batch_size` must not be larger than the number of examples."""
    for epoch in itertools.count():
        rng = np.random.default_rng([*seed, epoch])
        order = list(rng.permutation(len(examples)))
        order += list(rng.choice(len(examples), size=-len(examples) % batch_size, replace=False))
        within = int(rng.integers(2**31))
        yield from _one_epoch([examples[i] for i in order], batch_size, max_tokens, within, widths)


def shuffled(count: int, seed: Sequence[int]) -> Iterator[int]:
    """0 to `count` - 1 without end, each once per epoch, in an order that is a function of (seed, epoch) alone."""
    for epoch in itertools.count():
        yield from np.random.default_rng([*seed, epoch]).permutation(count).tolist()


def turns(shares: Sequence[float]) -> Iterator[int]:
    """Places 0, 1, … in turn and without end, each as often as its share of `shares` says (their sum need not be 1).

    Whoever is furthest behind comes next, the first of equals: after any number of turns, each place has had its
    share of them to less than one turn (two places), so that no chance decides what one optimizer step is made of.
    """
    total = sum(shares)
    owed = [0.0] * len(shares)
    while True:
        owed = [behind + share / total for behind, share in zip(owed, shares, strict=True)]
        chosen = max(range(len(owed)), key=lambda i: (round(owed[i], 9), -i))
        owed[chosen] -= 1.0
        yield chosen


def batches_once(examples: Sequence[Encoded], *, batch_size: int, max_tokens: int) -> Iterator[Batch]:
    """Every example once, similar lengths together, for evaluation; the last batch may be smaller."""
    ordered = sorted(examples, key=lambda e: len(e.tokens))
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        yield from _one_epoch(chunk, len(chunk), max_tokens, seed=None)


def padded(inputs: int, widths: int = WIDTHS) -> int:
    """How long a micro-batch is made whose longest row has so many inputs (a token less than the row)."""
    return widths * -(-inputs // widths)


def buckets(length: int) -> int:
    """Rows for which this is the same are of like length, and may share a micro-batch."""
    return -(-length // 32)


def of_like_length(rows: Sequence[Encoded], together: int) -> Iterator[list[int]]:
    """Places of rows of like length, of which at most `together` tokens (padding included), or one row."""
    places: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].tokens)):
        if places and (len(places) + 1) * padded(len(rows[i].tokens)) > together:
            yield places
            places = []
        places.append(i)
    if places:
        yield places


def as_batch(rows: Sequence[Encoded]) -> Batch:
    """`rows`, the shortest first, as one micro-batch in that order."""
    (batch,) = batches_once(rows, batch_size=len(rows), max_tokens=padded(max(len(row.tokens) for row in rows)))
    return batch


def shuffled_batches(examples: Sequence[Encoded], *, batch_size: int, max_tokens: int, seed: int) -> Iterator[Batch]:
    """Every example once, similar lengths together, the micro-batches in the order of `seed`.

    The number of examples must be a multiple of `batch_size`.
    """
    return _one_epoch(examples, batch_size, max_tokens, seed)


def _one_epoch(
    examples: Sequence[Encoded], batch_size: int, max_tokens: int, seed: int | None, widths: int = WIDTHS
) -> Iterator[Batch]:
    rows = [(e.tokens, e.offset) for e in examples]
    # one more than the longest row: mlx-lm counts the padding token after a row's end as a target otherwise
    for tokens, spans in iterate_batches(rows, batch_size, max_tokens + 1, loop=False, seed=seed):
        spans = spans - mx.array([[0, 1]])
        yield tokens[:, : 1 + padded(int(spans[:, 1].max()), widths)], spans


def target_positions(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices into (rows x length) of the positions whose next token is a target, and those tokens."""
    tokens, spans = np.array(batch[0]), np.array(batch[1])
    steps = np.arange(1, tokens.shape[1])
    mask = (steps >= spans[:, :1]) & (steps <= spans[:, 1:])
    return np.flatnonzero(mask), tokens[:, 1:][mask]
