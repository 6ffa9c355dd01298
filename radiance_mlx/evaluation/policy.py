"""What becomes of a trained checkpoint, by its metrics. Pure functions; nothing here measures or acts.

The default metric looks at the step, not at the whole way from the base: a bound on the cumulative forms ends by
refusing every update of a long stream. Thresholds are in the metric's own unit (nats a token).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..messages import Outcome

#: how much of the batch could not be learnt; the one metric that needs no anchors
FINETUNE_LOSS = "finetune_loss"
Mode = Literal["off", "warn", "auto_rollback"]
Confidence = Literal["mean", "lower_bound"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Fire when `metric` is over `threshold`: its mean, or only when the lower end of its interval is."""

    mode: Mode
    metric: str
    threshold: float
    confidence: Confidence = "mean"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`outcome`: "pass"; "unknown" (nothing was measured); or, over the threshold, what the mode makes of it."""

    outcome: Outcome
    reason: str
    metric: str
    value: float | None
    threshold: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge(rule: Rule, metrics: Mapping[str, Any]) -> Verdict:
    """`metrics` holds means under their names, and `intervals: {name: [low, high]}`."""
    value = metrics.get(rule.metric)
    if value is not None and rule.confidence == "lower_bound":
        interval = (metrics.get("intervals") or {}).get(rule.metric)
        value = interval[0] if interval else value
    if value is None:
        return Verdict("unknown", f"{rule.metric} was not measured", rule.metric, None, rule.threshold)
    what = f"{rule.metric}{' (lower bound)' if rule.confidence == 'lower_bound' else ''}"
    if not fires(rule, value):
        reason = f"{what} {value:.4g} is not over {rule.threshold:.4g}"
        return Verdict("pass", reason, rule.metric, value, rule.threshold)
    outcomes: dict[str, Outcome] = {"off": "logged", "warn": "risky", "auto_rollback": "rejected"}
    reason = f"{what} {value:.4g} is over {rule.threshold:.4g}"
    return Verdict(outcomes[rule.mode], reason, rule.metric, value, rule.threshold)


def fires(rule: Rule, value: float) -> bool:
    """Whether a value is over the threshold. A value that is no number always is."""
    return not value <= rule.threshold


def next_scale(passed: float, failed: float) -> float:
    """Where bisection for the largest scale that passes looks next, between one that did and one that did not."""
    return (passed + failed) / 2
