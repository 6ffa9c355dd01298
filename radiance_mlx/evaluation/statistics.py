"""Means over anchor tokens, and how sure one can be of them.

Tokens of one document hang together, documents do not: so the bootstrap draws whole documents. (One that drew
tokens would call noise a change far too often.) A difference between two checkpoints is taken document by
document, on the same anchors, before anything is drawn: paired. Pure NumPy; no MLX.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2_000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tokens and its 95% interval."""

    mean: float
    low: float
    high: float


@lru_cache(maxsize=1)
def _drawn(documents: int, seed: int, resamples: int) -> np.ndarray:
    """(resamples, documents): how often each document comes in each resample; the same for all metrics of a set."""
    drawn = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), size=resamples)
    return drawn.astype(np.float64)


def token_mean(sums: ArrayLike, tokens: ArrayLike) -> float:
    """Σ sums / Σ tokens: every token counts the same, whichever document it is in."""
    return float(np.sum(sums) / np.sum(tokens))


def estimate(sums: ArrayLike, tokens: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The token mean of per-document `sums`, with a percentile bootstrap interval over documents.

    `sums[i]` is the sum over the `tokens[i]` counted tokens of document i; for a paired comparison, of the
    differences. One document gives an interval without width: nothing is known about others.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 8.
    """
    values, counts = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if values.shape != counts.shape or values.ndim != 1 or not len(values):
        raise ValueError("sums and tokens must be two lists of the same length, not empty")
    if (counts <= 0).any():
        raise ValueError("every document needs at least one token that counts")
    n = len(values)
    drawn = _drawn(n, seed, resamples)
    means = (drawn @ values) / (drawn @ counts)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(token_mean(sums, tokens), float(low), float(high))
