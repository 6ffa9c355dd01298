"""What travels with each sequence through mlx-lm's `BatchGenerator`: its adapter slot and its sampling.

Both ride as one more entry in the sequence's prompt cache, which the generator merges, filters, extends and
extracts like any other. The model wrapper takes the entry off, sets the bank's rows, and the one sampler that
all sequences share reads temperatures, top_p and keys from it. A row's key is (seed, tokens drawn so far), so
its answer is the same alone and in any batch, but for rounding. What some rows want beyond that (`wishes`) costs
nothing in a batch in which no row does, and changes no other row.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import apply_top_p

from ..lora.bank import BASE_SLOT, ActiveRows, RowSlots
from ..lora.head import TargetRows, unadapted
from .fused import FusedStable
from .wishes import Wishes, shaped, tell

COLDEST, HOTTEST = 1e-4, 1e30  # of temperatures: dividing by less overflows, by more is not done in 32 bits
NARROWEST = 1e-7  # of top_p: less than the likeliest token of any vocabulary has


class RowState:
    """One sequence's slot and sampling; `drawn` counts its tokens.

    What leaves one token only, so little heat or top_p, is greedy (temperature 0).
    """

    __slots__ = ("checkpoint", "drawn", "seed", "slot", "temperature", "top_p", "wishes")

    def __init__(
        self,
        slot: int,
        temperature: float,
        top_p: float,
        seed: int,
        checkpoint: str | None = None,
        wishes: Wishes | None = None,
    ) -> None:
        """`checkpoint` is what the slot holds, if that stays as it is."""
        self.slot, self.top_p, self.seed, self.checkpoint = slot, top_p, seed, checkpoint
        self.wishes = wishes
        one_only = temperature < COLDEST or top_p < NARROWEST
        self.temperature = 0.0 if one_only else min(temperature, HOTTEST)
        self.drawn = 0


class RowEntry:
    """The rows of a batch, in its order, as an entry of mlx-lm's prompt cache (holds no arrays to trim)."""

    def __init__(self, rows: Sequence[RowState]) -> None:
        self._set(list(rows))

    def _set(self, rows: list[RowState]) -> None:
        self.rows = rows
        slots = [row.slot for row in rows]
        self.slots = None if all(slot == BASE_SLOT for slot in slots) else RowSlots(slots)
        self.greedy = all(row.temperature == 0 for row in rows)
        wishes = [(place, row.wishes) for place, row in enumerate(rows) if row.wishes is not None]
        self.shaped = [(place, wish) for place, wish in wishes if wish.shapes]
        self.told = [(place, wish) for place, wish in wishes if wish.logprobs is not None]
        self.inputs: mx.array | None = None  # what the model has just been given, if it matters
        names = {row.checkpoint for row in rows}
        self.checkpoint = names.pop() if len(names) == 1 else None  # what all rows use

    # --- what mlx-lm asks of a cache -------------------------------------------------------------

    @classmethod
    def merge(cls, entries: Sequence["RowEntry"]) -> "RowEntry":
        return cls([row for entry in entries for row in entry.rows])

    def extend(self, other: "RowEntry") -> None:
        self._set(self.rows + other.rows)

    def filter(self, keep: Any) -> None:
        self._set([self.rows[int(i)] for i in keep])

    def extract(self, index: int) -> "RowEntry":
        return RowEntry([self.rows[index]])

    def prepare(self, **_: Any) -> None:
        """Padding concerns keys and values only."""

    def finalize(self) -> None:
        """Padding concerns keys and values only."""

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        return n

    def size(self) -> int:
        return 0

    def empty(self) -> bool:
        return False

    @property
    def state(self) -> list[mx.array]:
        return []

    @property
    def nbytes(self) -> int:
        return 0

    def __deepcopy__(self, memo: Any) -> "RowEntry":
        # rows are shared: the generator copies a batch when it splits it, and each row lives in one half
        return RowEntry(self.rows)


class BankModel(nn.Module):
    """The serving tree as `BatchGenerator` calls it: the last cache entry says which adapter each row has.

    While all rows have the checkpoint that is `fused`, its own tree answers.
    """

    def __init__(
        self, tree: nn.Module, rows: ActiveRows, fused: FusedStable | None = None, head: TargetRows | None = None
    ) -> None:
        """`head` is that of `tree`, where it takes single places; None: it cannot be told to."""
        super().__init__()
        self.tree = tree
        self._active, self._fused, self._head = rows, fused, head
        self.current: RowEntry | None = None

    @property
    def takes_places(self) -> bool:
        """Whether there is `at`: not once an adapter has come of which the head is a part."""
        return unadapted(self._head, self._active.paths) is not None

    @property
    def layers(self) -> Any:
        return self.tree.layers

    def new_cache(self, row: RowState) -> list[Any]:
        """A fresh prompt cache for one sequence."""
        return [*make_prompt_cache(self.tree), RowEntry([row])]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        entry = cache[-1]
        self._draws(entry, tokens)
        tree, _ = self._answering(entry)
        return tree(tokens, cache=cache[:-1])

    def at(self, tokens: mx.array, cache: list[Any], places: mx.array) -> mx.array:
        """The logits (n, vocabulary) after n of `tokens`, (rows, length), whose flat indices `places` (n,) are."""
        entry = cache[-1]
        tree, head = self._answering(entry)
        assert head is not None
        alike = entry.slots is None or entry.slots.only is not None  # else a bank's linear must know whose row is where
        with head.only_at(places, narrows=alike):
            return tree(tokens, cache=cache[:-1])[0]

    def draws_next(self, cache: list[Any], last: mx.array) -> None:
        """What is drawn next are tokens for all rows of `cache` after their `last`, (rows, 1)."""
        self._draws(cache[-1], last)

    def _draws(self, entry: RowEntry, tokens: mx.array) -> None:
        self.current = entry
        if entry.shaped:
            entry.inputs = tokens

    def _answering(self, entry: RowEntry) -> tuple[nn.Module, TargetRows | None]:
        if self._fused and self._fused.tree and entry.checkpoint == self._fused.name:
            return self._fused.tree, self._fused.head
        self._active.slots = entry.slots
        return self.tree, self._head


class RowSampler:
    """Draws one token for each row of the batch that the model has just run.

    `beside` are the arrays, other than these tokens, that are to be computed with them.
    """

    def __init__(self, model: BankModel) -> None:
        self._model = model
        self.beside: list[mx.array] = []

    def __call__(self, logits: mx.array) -> mx.array:
        """(rows, vocabulary) logits → (rows,) tokens."""
        entry = self._model.current
        assert entry is not None
        drawn_from = logits
        if entry.shaped:
            assert entry.inputs is not None
            drawn_from = shaped(logits, entry.shaped, entry.inputs[:, -1], [row.drawn for row in entry.rows])
        tokens = self._draw(drawn_from, entry)
        self.beside = tell(logits, tokens, entry.told) if entry.told else []
        return tokens

    def _draw(self, logits: mx.array, entry: RowEntry) -> mx.array:
        rows = entry.rows
        keys = [[row.seed, row.drawn] for row in rows]
        for row in rows:
            row.drawn += 1
        best = mx.argmax(logits, axis=-1)
        if entry.greedy:
            return best
        logits = logits.astype(mx.float32)
        if any(row.top_p < 1.0 for row in rows):
            logits = _top_p(logits, rows)
        heat = mx.array([[row.temperature or 1.0] for row in rows])
        drawn = mx.vmap(_draw)(logits / heat, mx.array(keys, dtype=mx.uint32))
        greedy = mx.array([row.temperature == 0 for row in rows])
        return mx.where(greedy, best, drawn.astype(best.dtype))


def _top_p(logits: mx.array, rows: Sequence[RowState]) -> mx.array:
    """`logits` without what each row's top_p cuts off; a row whose top_p is 1 keeps its own, to the last bit."""
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    cut = apply_top_p(logprobs, mx.array([[max(row.top_p, NARROWEST)] for row in rows]))
    return mx.where(mx.array([[row.top_p >= 1.0] for row in rows]), logits, cut)


def _draw(logits: mx.array, key: mx.array) -> mx.array:
    return mx.random.categorical(logits, key=key)
