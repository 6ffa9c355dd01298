"""What some rows want of each step beyond a token: other logits to draw from, log-probabilities.

A batch in which no row has wishes makes none of these arrays. A row's wishes depend on its own tokens alone, so it
answers as it would by itself, and nobody beside it answers otherwise.
"""

from collections import deque
from collections.abc import Sequence

import mlx.core as mx

from ..messages import Sampling

Placed = Sequence[tuple[int, "Wishes"]]  # (place in the batch, the row's wishes)


class Wishes:
    """One row's. `logprobs` None: none are told; else how many of the likeliest come with each token's own."""

    __slots__ = ("_bias", "_counts", "_pairs", "frequency", "logprobs", "presence", "steps")

    def __init__(self, sampling: Sampling) -> None:
        self.frequency, self.presence = sampling.frequency_penalty, sampling.presence_penalty
        self.logprobs = sampling.logprobs
        self._pairs = sampling.logit_bias
        self._bias: mx.array | None = None
        self._counts: mx.array | None = None
        #: of the tokens that were drawn and not read yet, oldest first: (a step's arrays, the row's place in them)
        self.steps: deque[tuple[StepLogprobs, int]] = deque()

    @classmethod
    def of(cls, sampling: Sampling) -> "Wishes | None":
        """None for who wants nothing more than a token."""
        wishes = cls(sampling)
        return wishes if wishes.shapes or wishes.logprobs is not None else None

    @property
    def _penalised(self) -> bool:
        return bool(self.frequency or self.presence)

    @property
    def shapes(self) -> bool:
        """Whether the row draws from other logits than the model's."""
        return self._penalised or bool(self._pairs)

    def change(self, vocabulary: int, last: mx.array | None) -> mx.array:
        """(vocabulary,) what is added to the logits, after `last` was drawn (None: nothing yet)."""
        if self._bias is None:
            self._bias = mx.zeros(vocabulary)
            if self._pairs:
                tokens, added = zip(*self._pairs, strict=True)
                self._bias = self._bias.at[mx.array(tokens)].add(mx.array(added))
        if not self._penalised:
            return self._bias
        if self._counts is None:
            self._counts = mx.zeros(vocabulary)
        if last is not None:
            self._counts = self._counts.at[last].add(1.0)
        return self._bias - self.frequency * self._counts - self.presence * (self._counts > 0)

    def next_logprobs(self) -> tuple[float, list[tuple[int, float]]]:
        """Of the oldest token that was not read yet: its own, and (token, logprob) of the likeliest in order."""
        step, place = self.steps.popleft()
        return step.read(place, self.logprobs or 0)


class StepLogprobs:
    """One step's log-probabilities, for the rows that want them; computed with the step, read after it."""

    def __init__(self, logits: mx.array, tokens: mx.array, likeliest: int) -> None:
        """(rows, vocabulary) logits as the model gave them, (rows,) tokens that were drawn."""
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        self._own = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)
        self._top: tuple[mx.array, mx.array] | None = None
        likeliest = min(likeliest, logits.shape[-1])
        if likeliest:
            best = mx.argpartition(-logprobs, likeliest - 1, axis=-1)[:, :likeliest]
            self._top = best, mx.take_along_axis(logprobs, best, axis=-1)
        self._lists: tuple[list[list[float]], list[list[tuple[int, float]]]] | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """What `read` reads."""
        return [self._own, *(self._top or ())]

    def read(self, place: int, likeliest: int) -> tuple[float, list[tuple[int, float]]]:
        """Row `place`: its token's, and the `likeliest` ones."""
        if self._lists is None:
            own, top = self._own.tolist(), self._top and [part.tolist() for part in self._top]
            pairs = [list(zip(*row, strict=True)) for row in zip(*top, strict=True)] if top else [[] for _ in own]
            self._lists = own, [sorted(row, key=lambda pair: (-pair[1], pair[0])) for row in pairs]
        own, ranked = self._lists
        return own[place][0], ranked[place][:likeliest]


def shaped(logits: mx.array, rows: Placed, last: mx.array, drawn: Sequence[int]) -> mx.array:
    """(rows, vocabulary) logits to draw from; those without such wishes keep theirs, to the last bit.

    `last` (rows,) are the tokens that the model was given, `drawn` how many each row has drawn.
    """
    places = mx.array([place for place, _ in rows])
    changes = [wish.change(logits.shape[-1], last[place] if drawn[place] else None) for place, wish in rows]
    return logits.astype(mx.float32).at[places].add(mx.stack(changes))


def tell(logits: mx.array, tokens: mx.array, rows: Placed) -> list[mx.array]:
    """Keep this step's log-probabilities for `rows`; the arrays that are to be computed with the step."""
    places = mx.array([place for place, _ in rows])
    most = max(wish.logprobs or 0 for _, wish in rows)
    step = StepLogprobs(logits[places], tokens[places], most)
    for place, (_, wish) in enumerate(rows):
        wish.steps.append((step, place))
    return step.arrays
