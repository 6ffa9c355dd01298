"""What the engine does next. Pure: counters and measured times in, an action out; no arrays, no clock.

With requests active, background work (training, evaluation) gets `share` of the engine's time; with none, all
of it. The account starts anew whenever one of the two sides becomes idle, so nobody saves up a claim, and a
slice that took long is paid back before the next one.
"""

from dataclasses import dataclass
from enum import Enum


class Action(Enum):
    """One engine step."""

    GENERATE = "generate"  # admit, prefill and decode
    BACKGROUND = "background"  # a slice of training or evaluation
    WAIT = "wait"


@dataclass(frozen=True)
class Load:
    """What there is to do."""

    requests: int  # active or waiting
    background: bool


class Planner:
    """Divides time by `share`, the background's part while requests are active (0 < share < 1)."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._owed = 0.0  # seconds of background work that the account allows; negative: paid back first
        self._contended = False

    def next(self, load: Load) -> Action:
        """The action for this load."""
        self._contended = load.requests > 0 and load.background
        if not self._contended:
            self._owed = 0.0
        if load.requests == 0:
            return Action.BACKGROUND if load.background else Action.WAIT
        return Action.BACKGROUND if self._contended and self._owed > 0 else Action.GENERATE

    def charge(self, action: Action, seconds: float) -> None:
        """Tell how long the last action took."""
        if not self._contended:
            return
        if action is Action.GENERATE:
            self._owed += seconds * self._share / (1.0 - self._share)
        elif action is Action.BACKGROUND:
            self._owed -= seconds
