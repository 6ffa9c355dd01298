"""A thread that computes training's pieces while the engine's own decodes: on a CPU, a core for each.

The engine's thread builds everything and says what comes next; this one only evaluates, on streams that no thread owns
(`lora.halves.shared`). MLX begins no more than about a hundred operations, of all streams together, before whoever
begins more of them waits: so one thread cannot keep two streams busy, and this one begins one array at a time, or
those who decode would wait for the room that its operations take.
"""

import threading
import time
from collections import deque

import mlx.core as mx

from ..config.schema import TrainingSection
from ..lora.halves import halves_here
from ..lora.step import Piece

#: the share of a machine that one core of two is; for more than that, training takes turns with those who decode
EVEN = 0.5


def goes_aside(training: TrainingSection) -> bool:
    """Whether, with these settings and on the default device, training goes on beside those who decode."""
    return training.aside == "auto" and training.slice_ms > 0 and training.share <= EVEN and halves_here()


def rest_s(seconds: float, part: float) -> float:
    """How long to rest after so much work, in seconds, so that it was `part` of the time; an hour at most."""
    return min(3600.0, seconds * (1.0 / part - 1.0))


class Lane:
    """Takes pieces from one thread, and evaluates them in another, which lives from the first of them to `close`.

    It works for `part` of the time (0 < part <= 1) that there is something to do. `fault` is what went wrong with a
    piece: nothing is computed after that.
    """

    def __init__(self, part: float = 1.0) -> None:
        self._part = part
        self._changed = threading.Condition()
        self._waiting: deque[Piece] = deque()
        self._busy = self._closed = False
        self.fault: Exception | None = None
        self._thread: threading.Thread | None = None

    # --- for the other thread --------------------------------------------------------------------

    def begin(self, piece: Piece) -> None:
        """Have `piece` computed after all others, unless there is a fault."""
        with self._changed:
            if self.fault is not None:
                return
            if self._thread is None:
                device = mx.default_device()
                thread = threading.Thread(target=self._work, args=(device,), name="radiance-lane", daemon=True)
                thread.start()
                self._thread = thread
            self._waiting.append(piece)
            self._changed.notify_all()

    def left(self) -> int:
        """How many pieces are not done."""
        with self._changed:
            return len(self._waiting) + self._busy

    def finish(self) -> None:
        """Wait for all pieces, or for a fault."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._busy))

    def take_back(self) -> list[Piece]:
        """The pieces that are not begun, in order, once nothing is computed any more."""
        with self._changed:
            pieces = [*self._waiting]
            self._waiting.clear()
            self._changed.wait_for(lambda: not self._busy)
            return pieces

    def close(self) -> None:
        """Forget what is not begun; returns when the thread has ended."""
        self.take_back()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self.fault = None

    # --- the thread ------------------------------------------------------------------------------

    def _work(self, device: mx.Device) -> None:
        mx.set_default_device(device)
        try:
            while (piece := self._next()) is not None:
                started = time.perf_counter()
                fault = _fault_of(piece)
                piece = None  # evaluated outputs must not be held
                self._done(fault)
                self._rest(time.perf_counter() - started)
        finally:
            mx.clear_streams()  # of this thread: one that ends with streams open aborts the process at exit

    def _next(self) -> Piece | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._busy = True
            return self._waiting.popleft()

    def _done(self, fault: Exception | None) -> None:
        with self._changed:
            if fault is not None:
                self.fault = fault
                self._waiting.clear()
            self._busy = False
            self._changed.notify_all()

    def _rest(self, seconds: float) -> None:
        if self._part < 1.0:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=rest_s(seconds, self._part))


def _fault_of(piece: Piece) -> Exception | None:
    """Evaluates `piece`, and gives what went wrong."""
    try:
        for array in piece.arrays:
            mx.eval(array)
    except Exception as error:
        return error.with_traceback(None)  # its frames hold the piece
    return None
