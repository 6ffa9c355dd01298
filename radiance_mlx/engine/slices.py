"""A run of pieces, evaluated as many as fit into a slice, without a pause between them.

Nor is there one after it, if that is wished: what a slice has begun last still computes when it ends, and whoever
comes next is begun behind it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator

import mlx.core as mx

from ..errors import RadianceError
from ..lora.halves import wait
from ..lora.step import Piece
from .products import use_threads

#: seconds of work that are begun together, as far as is known; one group computes while the next is made
GROUP_S = 0.015
#: in so little time between two slices nobody else has computed anything
NOTHING_S = 0.001


class Slices:
    """Drives a generator of pieces. `check` is called before each group of them is begun, and may raise."""

    def __init__(self, pieces: Iterator[Piece], check: Callable[[], None]) -> None:
        self._pieces, self._check = pieces, check
        self._next: Piece | None = None  # taken already, for a group of its own kind
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

    def stop(self) -> None:
        """Wait for what is under way, and forget it."""
        self._begun.clear()
        wait()

    def _run(self, seconds: float, leave: bool) -> bool:
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
            piece, self._next = self._next or next(self._pieces, None), None
            if piece is None:
                return group, True
            if group and piece.threads != group[0].threads:
                self._next = piece
                break
            group.append(piece)
            if piece.barrier:
                break
        return group, False


def reason(error: Exception) -> str:
    """What ended a run, for a log: an error of ours in its own words, any other with its kind."""
    return error.message if isinstance(error, RadianceError) else f"{type(error).__name__}: {error}"
