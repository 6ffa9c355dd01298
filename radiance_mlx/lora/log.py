"""What of the log of earlier examples still holds. Pure, and without arrays: the event loop asks too."""

from collections.abc import Sequence

from ..messages import Example


def still_true(log: Sequence[Example], new: Sequence[Example]) -> list[Example]:
    """`log` (oldest first) without what has been answered otherwise since: of equal prompts the last one counts.

    A prompt that is in `new` is left out too, with whatever answer it had. Plain texts all stay.
    """
    last = {e.messages[:-1]: i for i, e in enumerate(log)}
    asked = {e.messages[:-1] for e in new}
    return [e for i, e in enumerate(log) if not (p := e.messages[:-1]) or (last[p] == i and p not in asked)]
