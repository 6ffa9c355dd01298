"""Rows that are held out of a batch: which, for how many steps, and when their loss says to stop.

A run with held-out rows has two phases. In the first the other rows are trained, and the held-out ones only
measured. In the second, unless they are to stay out for good, the held-out rows are learnt too: half of each step's
rows are theirs. With nothing held out there is the first phase alone, and it is the plain run.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..config.schema import TrainingSection
from .batches import Batch
from .encoding import Encoded
from .replay import EARLIER, NEW, Place, Replay, mixed_stream

#: tells these draws from the others that are made from the same (seed, batch number)
_CHOICE, _SECOND = 5, 6
#: and the order of the held-out rows from those of the other places of a step
_HELD = 5
_WEIGHTS, _OPTIMIZER = "weights/", "optimizer/"


@dataclass(frozen=True)
class Best:
    """An adapter and its optimizer's state at the evaluation with the lowest loss so far, both flat."""

    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]

    def arrays(self) -> dict[str, mx.array]:
        """Both in one, for a file."""
        return {
            **{_WEIGHTS + name: value for name, value in self.weights.items()},
            **{_OPTIMIZER + name: value for name, value in self.optimizer.items()},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, mx.array]) -> "Best":
        """The inverse of `arrays`."""

        def below(prefix: str) -> dict[str, mx.array]:
            return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

        return cls(below(_WEIGHTS), below(_OPTIMIZER))


class Holdout:
    """One batch's rows, `trained` and `held`, and the steps of both phases.

    `second_from` is the step at which the second phase began, None before. `origins[i]` tells which original
    `examples[i]` is, or says in other words: rows of one original are held out together.
    """

    def __init__(
        self, examples: Sequence[Encoded], origins: Sequence[int], settings: TrainingSection, number: int
    ) -> None:
        self._settings, self._seed = settings, (settings.seed, number)
        out = set(held_out(examples, origins, settings.eval_fraction, self._seed))
        self.held = [e for i, e in enumerate(examples) if i in out]
        self.trained = [e for i, e in enumerate(examples) if i not in out]
        #: of the originals, those that are never trained on
        self.never_trained = sorted({origins[i] for i in out}) if settings.eval_holdout else []
        self.second_from: int | None = None
        #: the losses for which the steps have been, or are being, run once more
        self.extended: list[float] = []
        self.best: Best | None = None

    @property
    def has_second(self) -> bool:
        """Whether the held-out rows are learnt in the end."""
        return bool(self.held) and not self._settings.eval_holdout

    @property
    def note(self) -> str:
        """What keeps it from doing what the settings say; "" if nothing does."""
        if self.held or not self._settings.eval_fraction:
            return ""
        return "nothing was held out for eval_loss: there is only one example (its copies and rewordings go with it)"

    @property
    def first_steps(self) -> int:
        """Optimizer steps of the first phase, unless it ends early."""
        steps = self._settings.max_steps
        if not self.has_second:
            return steps * (1 + len(self.extended))
        return min(max(1, round(steps * (1.0 - self._settings.eval_fraction))), steps - 1)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of both phases, as far as is known by now."""
        if not self.has_second:
            return self.first_steps
        return self._settings.max_steps if self.second_from is None else self.second_from + self.second_steps

    @property
    def second_steps(self) -> int:
        """Optimizer steps of the second phase: what is left, or fewer in proportion if the first ended early."""
        at = self.first_steps if self.second_from is None else self.second_from
        left = self._settings.max_steps - at
        if at >= self.first_steps:
            return left
        fraction = self._settings.eval_fraction
        return min(left, math.ceil(round(at * fraction / (1.0 - fraction), 9)))

    def out_of_patience(self, losses: Sequence[float]) -> bool:
        """Whether the last `patience` of the held-out `losses` were no lower than the lowest before them."""
        patience = self._settings.patience
        return bool(losses and patience) and since_lowest(losses) >= patience

    def keep_best(self, losses: Sequence[float], weights: dict[str, mx.array], optimizer: dict[str, mx.array]) -> None:
        """Keep what the last of `losses` was measured with, if it is the lowest and may be gone back to."""
        if self._settings.patience and since_lowest(losses) == 0:
            mx.eval(weights, optimizer)  # a copy that is made later would hold on to what it is made from
            self.best = Best(weights, optimizer)

    def second_stream(
        self, replay: Replay | None, *, batch_size: int, accumulate: int, max_tokens: int
    ) -> Iterator[Batch]:
        """The second phase's micro-batches without end: as many held-out rows as others, beside what is replayed."""
        again = replay.fraction if replay is not None and replay.active else 0.0
        half = (1.0 - again) / 2
        places = [Place(self.trained, half, NEW), Place(self.held, half, _HELD)]
        if replay is not None and again:
            places.append(Place(replay.examples, again, EARLIER, once=True))
        return mixed_stream(
            places,
            batch_size=batch_size,
            accumulate=accumulate,
            max_tokens=max_tokens,
            seed=(*self._seed, _SECOND),
        )


def since_lowest(losses: Sequence[float]) -> int:
    """How many of `losses` (at least one) came after the lowest, of equals after the first."""
    return len(losses) - 1 - min(range(len(losses)), key=lambda i: (losses[i], i))


def held_out(examples: Sequence[Encoded], origins: Sequence[int], fraction: float, seed: Sequence[int]) -> list[int]:
    """Places of the rows to hold out: about `fraction` of the originals, at least one, and never all.

    All rows of an original go together, and so do originals that share a row: what is measured must not be trained
    under another name. Empty if there is but one. A function of the arguments alone.
    """
    groups = _together(examples, origins)
    if fraction <= 0.0 or len(groups) < 2:
        return []
    count = min(max(1, round(len(groups) * fraction)), len(groups) - 1)
    chosen = np.random.default_rng([*seed, _CHOICE, 0, 1]).permutation(len(groups))[:count]
    return sorted(place for group in chosen for place in groups[group])


def _together(examples: Sequence[Encoded], origins: Sequence[int]) -> list[list[int]]:
    """Places of rows, those together that are of one original or have the same tokens; in order of appearance."""
    above: dict[Hashable, Hashable] = {}

    def top(key: Hashable) -> Hashable:
        while above.setdefault(key, key) != key:
            above[key] = key = above[above[key]]
        return key

    for example, origin in zip(examples, origins, strict=True):
        above[top(example.tokens)] = top(origin)
    groups: dict[Hashable, list[int]] = {}
    for place, origin in enumerate(origins):
        groups.setdefault(top(origin), []).append(place)
    return list(groups.values())
