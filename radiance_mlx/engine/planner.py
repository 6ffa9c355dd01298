"""What the engine does next. Pure: counters and measured times in, an action out; no arrays, no clock.

With requests active, background work (training, evaluation) gets `share` of the engine's time; with none, all
of it. The account starts anew whenever one of the two sides becomes idle, so nobody saves up a claim, and a
slice that took long is paid back before the next one.

Whoever decodes waits for one thing at a time: a slice, or the prompts of those who join, never both between two
tokens. After a slice comes a step without newcomers, and before one a step with them, if there are any; each
step with newcomers lets a slice come next that is due, so that prompts without end do not keep training waiting.
"""

from dataclasses import dataclass
from enum import Enum


class Action(Enum):
    """One engine step."""

    GENERATE = "generate"  # admit, prefill and decode
    DECODE = "decode"  # the next tokens of those who decode, and nothing else
    BACKGROUND = "background"  # a slice of training or evaluation
    WAIT = "wait"


@dataclass(frozen=True)
class Load:
    """What there is to do."""

    requests: int  # in all: waiting, joining or decoding
    decoding: int  # of these, those who have their first token
    background: bool


class Planner:
    """Divides time by `share`, the background's part while requests are active (0 < share < 1)."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._owed = 0.0  # seconds of background work that the account allows; negative: paid back first
        self._contended = False
        self._last = Action.WAIT
        self._joined = False  # whether the last action was for newcomers, too

    def next(self, load: Load) -> Action:
        """The action for this load."""
        action = self._next(load)
        self._last, self._joined = action, action is Action.GENERATE and load.decoding < load.requests
        return action

    def _next(self, load: Load) -> Action:
        self._contended = load.requests > 0 and load.background
        if not self._contended:
            self._owed = 0.0
            return Action.GENERATE if load.requests else Action.BACKGROUND if load.background else Action.WAIT
        kept_waiting = load.decoding and load.decoding < load.requests  # by newcomers
        sliced = self._last is Action.BACKGROUND
        if self._owed > 0 and (sliced or self._joined or not kept_waiting):
            return Action.BACKGROUND
        return Action.DECODE if sliced and kept_waiting else Action.GENERATE

    def charge(self, action: Action, seconds: float) -> None:
        """Tell how long the last action took."""
        if not self._contended:
            return
        if action is Action.BACKGROUND:
            self._owed -= seconds
        elif action is not Action.WAIT:
            self._owed += seconds * self._share / (1.0 - self._share)
