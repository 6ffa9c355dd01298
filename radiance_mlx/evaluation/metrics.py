"""The metrics of one checkpoint on anchors, from sums over each document's tokens. Pure NumPy; nats a token.

p0, q, p: next-token distributions of the base, of the parent and of this checkpoint. All means are over tokens;
all intervals are 95%, by bootstrap over documents (see `statistics`).

    forgetting_loss        −Σ p0 log p = H(p0) + KL(p0 ‖ p)
    forgetting_kl          KL(p0 ‖ p)
    forgetting_loss_delta  forgetting_loss of this checkpoint less that of its parent
    drift_loss, drift_kl   the first two with q in place of p0
    anchor_ce_delta        log p0(y) − log p(y) on the anchors' own tokens y; may be negative
    base_agreement         share of tokens where p and p0 find the same token likeliest
    retention_score        exp(−forgetting_kl), in (0, 1]

The divergences are lower bounds where the vocabulary is larger than what is kept (see `divergence`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NonFinite
from .statistics import Estimate, estimates

NAMES = (
    "forgetting_loss",
    "forgetting_kl",
    "forgetting_loss_delta",
    "drift_loss",
    "drift_kl",
    "anchor_ce_delta",
    "base_agreement",
    "retention_score",
)
#: those that have no place on anchors, but are measured with them
UPDATE_NAMES = ("update_kl", "update_retention")
Sums = np.ndarray


@dataclass(frozen=True)
class AnchorSums:
    """Sums over the counted tokens of each document, (documents,) each; the parent's are None where it is unknown.

    `base_entropy` ΣH(p0), `base_target` Σlog p0(y), `target` Σlog p(y), `base_kl` ΣKL(p0 ‖ p), `agreement` Σ1[same
    likeliest token], `parent_entropy` ΣH(q), `parent_kl` ΣKL(q ‖ p), `parent_base_kl` ΣKL(p0 ‖ q).
    """

    tokens: Sums
    base_entropy: Sums
    base_target: Sums
    target: Sums
    base_kl: Sums
    agreement: Sums
    parent_entropy: Sums | None = None
    parent_kl: Sums | None = None
    parent_base_kl: Sums | None = None


def anchor_metrics(sums: AnchorSums, out: dict[str, Any], *, seed: int = 0) -> Iterator[None]:
    """Put `{name: mean or None, …, "intervals": {name: [low, high], …}}` for all of `NAMES` into `out`.

    Yields now and then, and is done when it ends. Raises `NonFinite` where weights gave what is no number.
    """
    wanted: dict[str, Sums | None] = {
        "forgetting_loss": sums.base_entropy + sums.base_kl,
        "forgetting_kl": sums.base_kl,
        "anchor_ce_delta": sums.base_target - sums.target,
        "base_agreement": sums.agreement,
        "drift_kl": sums.parent_kl,
    }
    if sums.parent_kl is not None and sums.parent_entropy is not None:
        wanted["drift_loss"] = sums.parent_entropy + sums.parent_kl
    if sums.parent_base_kl is not None:
        wanted["forgetting_loss_delta"] = sums.base_kl - sums.parent_base_kl
    found: dict[str, Estimate] = {}
    known = {name: values for name, values in wanted.items() if values is not None}
    if not all(np.isfinite(values).all() for values in known.values()):
        raise NonFinite(
            "On the anchors, the weights give values that are no numbers or infinite.",
            "The adapter cannot be used: it may be damaged, or was trained at too high a rate.",
        )
    yield from estimates(known, sums.tokens, found, seed=seed)
    found["retention_score"] = _retention(found["forgetting_kl"])
    out.update({name: found[name].mean if name in found else None for name in NAMES})
    out["intervals"] = {name: [found[name].low, found[name].high] for name in NAMES if name in found}


def _retention(divergence: Estimate) -> Estimate:
    mean, low, high = (math.exp(-max(0.0, nats)) for nats in (divergence.mean, divergence.high, divergence.low))
    return Estimate(mean, low, high)


def nothing_measured() -> dict[str, Any]:
    """The same fields, all None: anchors are off, or could not be had."""
    return {**dict.fromkeys((*NAMES, *UPDATE_NAMES)), "intervals": {}}


def kept_gain(before: float, after: float, now: float) -> float | None:
    """How much of an update's gain is left: (before − now) / (before − after), losses of its own examples.

    1: all of it; 0: as if never taught; negative: worse than before. None where there was no gain to keep.
    """
    gain = before - after
    return (before - now) / gain if gain > 1e-6 else None
