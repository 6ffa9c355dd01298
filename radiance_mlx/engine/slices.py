"""A run of pieces, evaluated as many as fit into a slice, without a pause between them."""

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


class Slices:
    """Drives a generator of pieces. `check` is called before each group of them is begun, and may raise."""

    def __init__(self, pieces: Iterator[Piece], check: Callable[[], None]) -> None:
        self._pieces, self._check = pieces, check
        self._next: Piece | None = None  # taken already, for a group of its own kind
        self._s_per_piece = 0.02  # few at a time until some have been timed
        self._begun: deque[list[Piece]] = deque()

    def run(self, seconds: float) -> bool:
        """Work for about `seconds`; whether all is done. Raises what the maker raises, with nothing under way."""
        try:
            return self._run(seconds)
        except BaseException:
            self._begun.clear()
            wait()
            raise

    def _run(self, seconds: float) -> bool:
        self._last = time.perf_counter()
        ends = self._last + seconds
        while True:
            self._check()
            left = ends - time.perf_counter() - self._s_per_piece * sum(map(len, self._begun))
            group, finished = self._take(max(1, int(min(GROUP_S, left) / self._s_per_piece)))
            self._begin(group)
            alone = finished or group[-1].barrier
            while len(self._begun) > (0 if alone else 1):
                self._finish()
            left = ends - time.perf_counter() - self._s_per_piece * sum(map(len, self._begun))
            if finished or left < self._s_per_piece or group[-1].pause:
                while self._begun:
                    self._finish()
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
        if any(piece.arrays for piece in group):
            # the time of the maker's own work (building the graph) is in it: small groups are safe; so is
            # forgetting slowly what dear pieces cost, for after cheap ones the next group may be of such again
            each = (now - self._last) / len(group)
            self._s_per_piece = max(each, self._s_per_piece + 0.3 * (each - self._s_per_piece))
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
