"""What of the log of earlier examples still holds. Pure, and without arrays: the event loop asks too."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..messages import Example

#: so many examples are looked at before others get a turn
LOOKED_AT = 32


def still_true(
    log: Sequence[Example],
    new: Sequence[Example],
    out: list[int],
    worded: Callable[[Example], Sequence[Example]] = lambda example: (),
) -> Iterator[None]:
    """Append to `out` the places in `log` (oldest first) of what has not been answered otherwise since.

    That is what no later example, nor one of `new`, asks again, in its own words or in those that `worded` gives for
    it. Plain texts all stay. Yields now and then, and is done when it ends.
    """

    def prompts(example: Example) -> set[tuple[Any, ...]]:
        return {asked for e in (example, *worded(example)) if (asked := e.question)}

    answered = set[tuple[Any, ...]]()
    for number, example in enumerate(new, 1):
        answered |= prompts(example)
        if number % LOOKED_AT == 0:
            yield
    kept = []
    for place in reversed(range(len(log))):
        own = prompts(log[place])
        if not own & answered:
            kept.append(place)
        answered |= own
        if place % LOOKED_AT == 0:
            yield
    out.extend(reversed(kept))
