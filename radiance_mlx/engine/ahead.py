"""What is asked of the base for every update alike, asked while nothing else is to be done: at the start, as a rule.

Engine's work like folding and training, in slices, but the last of all: requests do not share the time with it. A batch
that has come to where it would ask the same waits for it, and shares as it would itself.
"""

import gc
import logging

from ..config import Config
from . import backend
from .foundation import Foundation
from .lasting import Lasting
from .slices import Slices, reason

log = logging.getLogger(__name__)


class AskingAhead:
    """Belongs to the engine's thread. There is nothing to do where no switch needs it, or without `ask_ahead`."""

    def __init__(self, foundation: Foundation, config: Config) -> None:
        self._slices: Slices | None = None
        self._lasting = lasting = Lasting.of(foundation, config) if config.rehearsal.ask_ahead else None
        if lasting is None or not lasting.asks:
            return
        if not lasting.base.begin_ahead():
            return
        longest = min(config.training.max_seq_length, foundation.base.context)
        self._slices = Slices(lasting.ask_ahead(longest), lambda: None)

    @property
    def pending(self) -> bool:
        """Whether something is still to be asked."""
        return self._slices is not None

    def slice(self, seconds: float) -> None:
        """Ask for about `seconds`. A fault is logged: the update that needs the answers asks again."""
        assert self._slices is not None
        try:
            if not self._slices.run(seconds):
                return
        except Exception as error:
            log.warning("the base could not be asked ahead of updates: %s", reason(error))
        self.stop()

    def stop(self) -> None:
        """Let go of it; what has been asked to its end is on disk."""
        if self._slices is None or self._lasting is None:
            return
        self._lasting.base.end_ahead()
        self._slices = self._lasting = None
        gc.collect()
        backend.release_memory()
