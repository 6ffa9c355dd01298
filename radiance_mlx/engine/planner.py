"""What the engine does next. Pure: counters and measured times in, an action out; no arrays, no clock.

With requests active, background work (training, evaluation) gets `share` of the engine's time; with none, all
of it. The account starts anew whenever one of the two sides becomes idle, so nobody saves up a claim, and a
slice that took long is paid back before the next one. What prompts have earned is not paid out at once either: between
two steps comes one slice, or as much as a step of those who decode earns, or a tenth of all that is owed; and of what
would be more than ten of these, nothing is owed.

Whoever decodes waits for one thing at a time: slices, or the prompts of those who join, never both between two
tokens. After slices comes a step without newcomers, and before them a step with newcomers, if there are any; each
of those lets a slice come next that is due, so that prompts without end do not keep training waiting.
"""

import math
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
    decoding: int  # of these, those whose prompts are computed, and who cannot join now
    background: bool


#: of a slice; of one that was shorter, for what was there could not be cut well, the rest may follow at once
SHORT = 0.25
#: over so many steps what is owed is paid out
OVER = 10


class Planner:
    """Divides time by `share`, the background's part while requests are active (0 < share < 1).

    `slice_s` is what one action of the background is to take.
    """

    def __init__(self, share: float, slice_s: float = 0.0) -> None:
        self._rate = share / (1.0 - share)  # seconds that each of a step earns the background
        self._slice_s = slice_s
        self._under_way = 0.0  # seconds of background work that are charged already, and still go on
        self._owed = 0.0  # seconds of background work that the account allows; negative: paid back first
        self._sliced = 0.0  # seconds of background work since the last step
        self._earned = 0.0  # by a step without newcomers, the last time
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
        enough = load.decoding > 0 and sliced and self._sliced > max(SHORT * self._slice_s, self._due)
        if self._owed > 0 and not enough and (sliced or self._joined or not kept_waiting):
            return Action.BACKGROUND
        return Action.DECODE if sliced and kept_waiting else Action.GENERATE

    @property
    def _due(self) -> float:
        """Seconds of the background between this step and the next."""
        return max(self._earned, (self._owed + self._sliced) / OVER)

    @property
    def slice_s(self) -> float:
        """How long the slice is to take that `next` has picked: after a short one, what is left of it."""
        if not self._contended:
            return self._slice_s
        return min(self._slice_s, max(self._slice_s, self._due) - self._sliced)

    def charge(self, action: Action, seconds: float, under_way_s: float = 0.0) -> None:
        """Tell how long the last action took, and how long what a slice has left under way will still take.

        That is the background's; what comes next waits for it.
        """
        waited = min(self._under_way, seconds)
        seconds, self._under_way = seconds - waited, 0.0
        if action is Action.BACKGROUND:
            seconds, self._under_way = seconds + under_way_s, under_way_s
        if not self._contended:
            self._sliced = 0.0
            return
        if action is Action.BACKGROUND:
            self._owed -= seconds
            self._sliced += seconds
            return
        self._sliced = 0.0
        if not self._joined:
            self._earned = seconds * self._rate
        most = OVER * max(self._slice_s, self._earned) if self._slice_s else math.inf
        self._owed = min(self._owed + seconds * self._rate, most)
