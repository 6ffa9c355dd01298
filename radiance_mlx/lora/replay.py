"""Earlier examples among the new ones, so that a new lesson does not overwrite the last.

What is replayed comes from a reservoir, a uniform sample of the whole earlier log: old updates weigh as much as
recent ones, and its size bounds memory and preparation whatever the log's length. Everything here is a pure
function of its arguments; the order of rows is one of (seed, batch number, epoch), so that a job taken up again
goes on with the very rows that would have come.

Reservoir sampling: Vitter, Random sampling with a reservoir, 1985 (algorithm R).
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from .batches import Batch, batch_stream, shuffled, shuffled_batches, turns
from .encoding import Encoded

Item = TypeVar("Item")

#: told apart from the other orders that are drawn from the same (seed, batch number)
NEW, EARLIER, _WITHIN = 1, 2, 3


@dataclass(frozen=True)
class Replay:
    """Earlier `examples` to train beside new ones: `fraction` of each optimizer step's rows, 0 ≤ fraction < 1.

    They are measured `refocus` times in a batch, and the hardest of them replayed from then on.
    """

    examples: Sequence[Encoded]
    fraction: float
    refocus: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction < 1.0:
            raise ValueError(f"fraction must be at least 0 and less than 1, not {self.fraction}")
        object.__setattr__(self, "examples", [e for e in self.examples if e.targets > 0])

    @property
    def active(self) -> bool:
        """Whether there is anything to replay."""
        return self.fraction > 0 and bool(self.examples)

    def rows_with(self, new: int) -> int:
        """How many examples there are to fill an optimizer step from, `new` ones and their share of earlier ones."""
        if not self.active:
            return new
        return new + min(len(self.examples), max(1, round(new * self.fraction / (1.0 - self.fraction))))

    def without(self, rows: Iterable[Encoded]) -> "Replay":
        """The same share of what is not among `rows`."""
        left_out = {e.tokens for e in rows}
        return replace(self, examples=[e for e in self.examples if e.tokens not in left_out])


@dataclass(frozen=True)
class Place:
    """`rows` (at least one) of a kind, their `share` of each optimizer step, and the `mark` that tells their order
    from others'. With `once`, no row comes twice in a step.
    """

    rows: Sequence[Encoded]
    share: float
    mark: int
    once: bool = False


def reservoir(log: Iterable[Item], size: int, seed: Sequence[int]) -> list[Item]:
    """At most `size` items of `log`, every item with the same chance; a function of the log's order and `seed`.

    A longer log with the same beginning keeps most of what a shorter one gave.
    """
    rng = np.random.default_rng(list(seed))
    kept: list[Item] = []
    for position, item in enumerate(log):
        if position < size:
            kept.append(item)
        elif (place := int(rng.integers(position + 1))) < size:
            kept[place] = item
    return kept


def replay_stream(
    new: Sequence[Encoded],
    replay: Replay | None,
    *,
    batch_size: int,
    accumulate: int,
    max_tokens: int,
    seed: tuple[int, int],
    focuses: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> Iterator[Batch]:
    """Micro-batches without end; `accumulate` of them, `batch_size` rows each, are one optimizer step's.

    With nothing to replay this is `batch_stream` itself. Otherwise new and earlier rows come in `turns`, each in
    a shuffled order of its own; a step never takes more earlier rows than there are. From each step in `focuses`
    on, the earlier rows are those at its places, in turn; it is looked at when that step's rows are asked for.
    """
    if replay is None or not replay.active:
        yield from batch_stream(new, batch_size=batch_size, max_tokens=max_tokens, seed=seed)
        return
    places = [Place(new, 1.0 - replay.fraction, NEW), Place(replay.examples, replay.fraction, EARLIER, once=True)]
    sizes = {"batch_size": batch_size, "accumulate": accumulate, "max_tokens": max_tokens}
    yield from mixed_stream(places, **sizes, seed=seed, focuses=focuses)


def mixed_stream(
    places: Sequence[Place],
    *,
    batch_size: int,
    accumulate: int,
    max_tokens: int,
    seed: tuple[int, ...],
    focuses: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> Iterator[Batch]:
    """As `replay_stream`, of rows from several `places` in `turns`; the first fills up what the others cannot.

    `focuses` are of the last place's rows.
    """
    rows = batch_size * accumulate
    order = turns([place.share for place in places])
    own: list[Iterator[int]] = [shuffled(len(place.rows), (*seed, place.mark)) for place in places]
    for step in itertools.count():
        if step in focuses:
            own[-1] = itertools.cycle(focuses[step])
        taken = Counter(itertools.islice(order, rows))
        counts = [min(taken[i], len(place.rows)) if place.once else taken[i] for i, place in enumerate(places)]
        counts[0] += rows - sum(counts)
        chosen = [
            place.rows[i]
            for place, mine, count in zip(places, own, counts, strict=True)
            for i in itertools.islice(mine, count)
        ]
        within = int(np.random.default_rng([*seed, _WITHIN, step]).integers(2**31))
        yield from shuffled_batches(chosen, batch_size=batch_size, max_tokens=max_tokens, seed=within)
