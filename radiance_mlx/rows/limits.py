"""How much one row, and one update, file or job, may become: each answer of a chat is an example with all before it.

A short chat of many answers is so much larger once it is understood than it was when it came; what is counted is what
is stored and learnt.
"""

from collections.abc import Sequence

from ..errors import PayloadTooLarge
from ..messages import Example

#: examples of one update, or of one file
MOST_EXAMPLES = 100_000
#: answers of one row, and characters of the examples that they are
ROW_ANSWERS = 1000
ROW_CHARACTERS = 2**24
#: a message counts as so many characters more than it has: it takes time and room, however short it is
PER_MESSAGE = 100
#: an update or a file may become so many times `server.max_body_mb`; one without earlier answers to learn never does
GROWTH = 8
#: of what comes without a configuration
MAX_BODY_MB = 16.0


class Room:
    """For the examples of one update or file; `max_body_mb` is that of the configuration."""

    def __init__(self, max_body_mb: float = MAX_BODY_MB) -> None:
        self._max_mb = max_body_mb * GROWTH
        self._characters = int(self._max_mb * 2**20)
        self._examples = MOST_EXAMPLES

    def take(self, examples: Sequence[Example]) -> None:
        """What one row became. Raises `PayloadTooLarge` if it is too much, with those before."""
        self._examples -= len(examples)
        self._characters -= sum(_size(example) for example in examples)
        if self._examples < 0:
            raise too_many()
        if self._characters < 0:
            raise PayloadTooLarge(
                f"The examples are more than {self._max_mb:g} MB: each answer of a chat is one, with all before it.",
                "Give fewer rows at once, or shorter chats; or raise server.max_body_mb.",
            )


def too_many() -> PayloadTooLarge:
    """More than `MOST_EXAMPLES`."""
    return PayloadTooLarge(
        f"There are more than {MOST_EXAMPLES:,} examples; each answer of a chat may be one.",
        "Give them in several parts.",
    )


def check_answers(lengths: Sequence[int], wanted: Sequence[int], tools: int) -> None:
    """Of one chat: the `lengths` of its messages, which of them are answers to be learnt, and the length of its tools.

    Raises `ValueError`, before any example is made.
    """
    if len(wanted) > ROW_ANSWERS:
        raise ValueError(f"{len(wanted)} answers are to be learnt, of one row {ROW_ANSWERS} at most: split the chat")
    up_to = [0]
    for length in lengths:
        up_to.append(up_to[-1] + length + PER_MESSAGE)
    total = sum(up_to[i + 1] + tools for i in wanted)
    if len(wanted) > 1 and total > ROW_CHARACTERS:
        raise ValueError(
            f"its {len(wanted)} answers, each with all before it, are {total / 2**20:.0f} MB of examples, of one row "
            f"{ROW_CHARACTERS // 2**20} MB at most: split the chat, or give weights"
        )


def _size(example: Example) -> int:
    messages = sum(len(content) + PER_MESSAGE for _, content in example.messages)
    return messages + sum(map(len, example.extras)) + len(example.tools) + len(example.text)
