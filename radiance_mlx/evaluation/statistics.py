"""Means over anchor tokens, and how sure one can be of them.

Tokens of one document hang together, documents do not: so the bootstrap draws whole documents. (One that drew
tokens would call noise a change far too often.) A difference between two checkpoints is taken document by
document, on the same anchors, before anything is drawn: paired. Pure NumPy; no MLX.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2_000
LEVEL = 0.95
#: so many documents are drawn before others get a turn
DRAWN_AT_ONCE = 100_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tokens and its 95% interval."""

    mean: float
    low: float
    high: float


def estimates(
    sums: Mapping[str, ArrayLike],
    tokens: ArrayLike,
    out: dict[str, Estimate],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Iterator[None]:
    """Put the token mean of each of `sums` into `out`, with a percentile bootstrap interval over documents.

    `sums[name][i]` is the sum over the `tokens[i]` counted tokens of document i; for a paired comparison, of the
    differences. All are computed on the same resamples, so differences of two are paired too. One document gives
    intervals without width: nothing is known about others. Yields now and then, and is done when it ends.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 8.
    """
    table = _table(sums, tokens)
    n, rng = len(table), np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // n)
    totals = np.empty((resamples, table.shape[1]))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        totals[start : start + rows] = _drawn(n, rows, rng) @ table
        yield
    low, high = np.quantile(totals[:, 1:] / totals[:, :1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    whole = table.sum(axis=0)
    for i, name in enumerate(sums):
        out[name] = Estimate(float(whole[i + 1] / whole[0]), float(low[i]), float(high[i]))


def _table(sums: Mapping[str, ArrayLike], tokens: ArrayLike) -> np.ndarray:
    """(documents, 1 + sums): the tokens, then each of the sums."""
    columns = [np.asarray(column, dtype=np.float64) for column in (tokens, *sums.values())]
    if any(column.ndim != 1 or column.shape != columns[0].shape or not len(column) for column in columns):
        raise ValueError("sums and tokens must be lists of the same length, not empty")
    if (columns[0] <= 0).any():
        raise ValueError("every document needs at least one token that counts")
    return np.stack(columns, axis=1)


def _drawn(documents: int, rows: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, documents): how often each document comes in each resample of as many."""
    places = rng.integers(documents, size=(rows, documents)) + np.arange(rows)[:, None] * documents
    return np.bincount(places.ravel(), minlength=rows * documents).reshape(rows, documents).astype(np.float64)
