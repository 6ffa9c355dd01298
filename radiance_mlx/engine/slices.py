"""A run of pieces, evaluated as many as fit into a slice, without a pause between them.

Nor is there one after it, if that is wished: what a slice has begun last still computes when it ends, and whoever
comes next is begun behind it. Or else no slices are cut: a `Lane` computes the pieces, and is only fed from here.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

import mlx.core as mx

from ..errors import RadianceError
from ..lora.halves import forget, shared
from ..lora.step import Piece
from .lane import Lane
from .products import use_threads

#: seconds of work that are begun together, as far as is known; one group computes while the next is made
GROUP_S = 0.015
#: in so little time between two slices nobody else has computed anything
NOTHING_S = 0.001
#: pieces that the lane is given ahead: of all but small models, more than it computes in one step of those who decode
DEPTH = 16
#: and no longer than this in one go, for they wait
FEEDING_S = 0.01


class Slices:
    """Drives a generator of pieces. `check` is called before each group of them is begun or asked for, and may raise.

    With a `lane` they may be computed there, too: what the maker itself evaluates must come after a barrier.
    """

    def __init__(self, pieces: Iterator[Piece], check: Callable[[], None], lane: Lane | None = None) -> None:
        self._pieces, self._check, self._lane = pieces, check, lane
        self._taken: deque[Piece] = deque()  # already, for a group of its own kind, or back from the lane
        self._barred = False  # whether what the lane was given last is a barrier
        self._s_per_piece = 0.02  # few at a time until some have been timed
        self._mean_s = 0.0  # of a piece, over the last ones
        self._begun: deque[list[Piece]] = deque()
        self._untimed = 0  # of these, how many are of a slice before, and others have computed meanwhile
        self._last = self._returned = 0.0  # when a group was last finished, and a slice

    @property
    def under_way_s(self) -> float:
        """About how long what is begun will still take, in seconds."""
        return self._mean_s * sum(map(len, self._begun))

    def run(self, seconds: float, *, leave: bool = False) -> bool:
        """Work for about `seconds`; whether all is done, and nothing is under way.

        With `leave` the last group of pieces may still be, if they are short; that it will take is part of `seconds`.
        Raises what the maker raises, with nothing under way.
        """
        try:
            return self._run(seconds, leave)
        except BaseException:
            self.stop()
            raise

    def feed(self) -> bool:
        """Give the lane what it has room for, and wait for nothing; whether all is done, and nothing is under way.

        Raises what the maker raises, or the lane's fault, with nothing under way.
        """
        try:
            return self._feed()
        except BaseException:
            self.stop()
            raise

    def take_back(self) -> None:
        """Nothing is computed by the lane any more; what it has not begun comes next."""
        if self._lane is None:
            return
        if self._lane.left():
            self._taken.extendleft(reversed(self._lane.take_back()))
        if self._lane.fault is not None:
            forget()  # MLX keeps a fault for whoever waits for the stream next: that must not be those who decode

    def stop(self) -> None:
        """Wait for what is under way, and forget it, and what goes wrong with it."""
        self._begun.clear()
        self.take_back()
        self._taken.clear()
        forget()

    def _feed(self) -> bool:
        assert self._lane is not None
        self._untimed = len(self._begun)  # others have computed since
        while self._begun:
            self._finish()
        use_threads(1)
        ends = time.perf_counter() + FEEDING_S
        while time.perf_counter() < ends:
            self._check()
            left = self._lane.left()
            self._raise_fault()  # after that: what is left is none once there is one
            if left >= DEPTH or (left and self._barred):
                break
            piece = self._ask(aside=True)
            if piece is None:
                self._lane.finish()
                self._raise_fault()
                return True
            if piece.arrays or left:  # an empty barrier, too: else it would not be taken back with what is before it
                self._lane.begin(piece)
            self._barred = piece.barrier or piece.pause
            if piece.pause:
                break
        return False

    def _raise_fault(self) -> None:
        if self._lane is not None and self._lane.fault is not None:
            raise self._lane.fault

    def _run(self, seconds: float, leave: bool) -> bool:
        self.take_back()
        self._raise_fault()
        now = time.perf_counter()
        ends = now + seconds
        if now - self._returned > NOTHING_S:
            self._untimed, self._last = len(self._begun), now
        while True:
            self._check()
            left = ends - time.perf_counter() - self._s_per_piece * sum(map(len, self._begun))
            group, finished = self._take(max(1, int(min(GROUP_S, left) / self._s_per_piece)))
            self._begin(group)
            alone = finished or group[-1].barrier or group[-1].pause
            while len(self._begun) > (0 if alone else 1):
                self._finish()
            left = ends - time.perf_counter() - self._s_per_piece * sum(map(len, self._begun))
            if finished or left < self._s_per_piece or group[-1].pause:
                while self._begun and not (leave and self._s_per_piece <= GROUP_S):  # dear ones must be timed
                    self._finish()
                self._returned = time.perf_counter()
                return finished

    def _begin(self, group: list[Piece]) -> None:
        if group:
            use_threads(group[0].threads)
        for piece in group:
            mx.async_eval(piece.arrays)
        self._begun.append(group)

    def _finish(self) -> None:
        """Wait for the group that was begun first."""
        group = self._begun.popleft()
        mx.eval([piece.arrays for piece in group])
        now = time.perf_counter()
        if self._untimed:
            self._untimed -= 1
        elif any(piece.arrays for piece in group):
            # the time of the maker's own work (building the graph) is in it: small groups are safe; so is
            # forgetting slowly what dear pieces cost, for after cheap ones the next group may be of such again
            each = (now - self._last) / len(group)
            self._s_per_piece = max(each, self._s_per_piece + 0.3 * (each - self._s_per_piece))
            self._mean_s += 0.1 * (each - self._mean_s) if self._mean_s else each
        self._last = now

    def _take(self, wanted: int) -> tuple[list[Piece], bool]:
        """At most so many pieces that are for as many threads of OpenBLAS; and whether there are no more."""
        group: list[Piece] = []
        while len(group) < wanted:
            piece = self._ask()
            if piece is None:
                return group, True
            if group and piece.threads != group[0].threads:
                self._taken.appendleft(piece)
                break
            group.append(piece)
            if piece.barrier:
                break
        return group, False

    def _ask(self, *, aside: bool = False) -> Piece | None:
        """The next piece; with a lane, built so that both threads may evaluate it."""
        if self._taken:
            return self._taken.popleft()
        with shared(aside=aside) if self._lane is not None else contextlib.nullcontext():
            return next(self._pieces, None)


def reason(error: Exception) -> str:
    """What ended a run, for a log: an error of ours in its own words, any other with its kind."""
    return error.message if isinstance(error, RadianceError) else f"{type(error).__name__}: {error}"
