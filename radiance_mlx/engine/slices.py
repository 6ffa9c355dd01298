"""A run of pieces, evaluated as many at a time as fit into a slice."""

import time
from collections.abc import Callable, Iterator

import mlx.core as mx

from ..errors import RadianceError
from ..lora.step import Piece
from .products import use_all_threads

#: of the time that is left, what a group of pieces is to take: some take longer than those before them
AIM = 0.8


class Slices:
    """Drives a generator of pieces. `check` is called before each evaluation and may raise."""

    def __init__(self, pieces: Iterator[Piece], check: Callable[[], None]) -> None:
        self._pieces, self._check = pieces, check
        self._s_per_piece = 0.02  # few at a time until some have been timed

    def run(self, seconds: float) -> bool:
        """Work for about `seconds`; whether all is done. Raises what the pieces' maker raises."""
        ends = time.perf_counter() + seconds
        while True:
            self._check()
            started = time.perf_counter()
            wanted = max(1, int(AIM * (ends - started) / self._s_per_piece))
            group, finished = self._take(wanted)
            use_all_threads()
            mx.eval([piece.arrays for piece in group])
            now = time.perf_counter()
            if any(piece.arrays for piece in group):
                # the time of the maker's own work (building the graph) is in it: small groups are safe; so is
                # forgetting slowly what dear pieces cost, for after cheap ones the next group may be of such again
                each = (now - started) / len(group)
                self._s_per_piece = max(each, self._s_per_piece + 0.3 * (each - self._s_per_piece))
            if finished:
                return True
            if now + self._s_per_piece > ends or (group and group[-1].pause):
                return False

    def _take(self, wanted: int) -> tuple[list[Piece], bool]:
        group: list[Piece] = []
        while len(group) < wanted:
            piece = next(self._pieces, None)
            if piece is None:
                return group, True
            group.append(piece)
            if piece.barrier:
                break
        return group, False


def reason(error: Exception) -> str:
    """What ended a run, for a log: an error of ours in its own words, any other with its kind."""
    return error.message if isinstance(error, RadianceError) else f"{type(error).__name__}: {error}"
