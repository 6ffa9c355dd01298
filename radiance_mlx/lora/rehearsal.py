"""Rehearsal: while it learns, a model is held to what the base said before, by a divergence as a further loss.

The base is always in memory, so it can be asked. A rehearsal row is a sequence of tokens with the base's own
distribution at each target: its likeliest next tokens and, as one more outcome, all the others together. The
divergence over these outcomes is a lower bound of the one over the whole vocabulary, and equal to it where that
is not larger than what is kept; the kept ones are never scaled up to sum to one.

loss = cross-entropy of the step's rows + `kl_weight` · mean over the rehearsed targets of KL(base ‖ now)

Rows come from what the base says by itself, from its answers to neighbours of the new prompts (`speaking`,
`neighbours`), or from the caller's own texts: as far as this module is concerned, rows are rows.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import CheckpointDamaged
from .batches import Batch, as_batch, buckets, of_like_length, padded, turns
from .distributions import DIVERGENCE, likeliest
from .encoding import Encoded
from .files import load_arrays, save_arrays
from .head import TargetRows
from .kept import load_kept, row_key, save_kept, size_of
from .prefix import rows_of, side_by_side
from .step import Piece, in_order, losses_at_targets, noted, quiet_logits
from .tree import TrainingTree

#: likeliest next tokens of which the probability is kept
TOP = 64
#: tokens that go through the base together when it is asked; and that are rehearsed in one micro-batch, where
#: `batch_size` rows are fewer: rows of a few tokens each would cost a pass over the weights for every `batch_size`
TOGETHER, REHEARSED_TOGETHER = 1024, 512
#: tell this order, and which part of a row comes, from what else is drawn from the same (seed, batch number)
_ROWS, _PARTS = 4, 5
ROWS_FILE, ARRAYS_FILE, HIDDEN = "rehearsal.json", "rehearsal.safetensors", "hidden"

#: tokens and spans as in `batches.Batch`, ids (n, K), logprobs (n, K) and tail (n,) of its n targets, and the
#: number of targets in all micro-batches of the optimizer step
RehearsalBatch = tuple[mx.array, mx.array, mx.array, mx.array, mx.array, int]
#: and what the tree's prefix makes of it, (rows, length, dims), if that is kept of all its rows
Begun = tuple[RehearsalBatch, mx.array | None]


@dataclass(frozen=True, eq=False)
class Rehearsed:
    """One row and what the base made of it: for each of its n targets `ids` (n, K) int32 of the K likeliest next
    tokens, their `logprobs` (n, K) float32, and `tail` (n,) float32, the log-probability of all others together.

    `hidden` (length - 1, dims) is what the tree's prefix makes of the row, if that is kept.
    """

    row: Encoded
    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray
    hidden: mx.array | None = None

    def part(self, number: int, of: int) -> "Rehearsed":
        """Of `of` consecutive parts of its targets, as long as each other, the one of this number, and what is before.

        What comes after a target has no part in its distribution.
        """
        count, before = self.row.targets, len(self.row.tokens) - self.row.targets
        start, end = count * number // of, count * (number + 1) // of
        row = Encoded(self.row.tokens[: before + end], before + start)
        hidden = None if self.hidden is None else self.hidden[: len(row.tokens) - 1]
        return Rehearsed(row, self.ids[start:end], self.logprobs[start:end], self.tail[start:end], hidden)


@dataclass(frozen=True)
class Source:
    """Rows of one kind, and their `share` of what is rehearsed (relative to the shares of the others)."""

    rows: Sequence[Rehearsed]
    share: float = 1.0


# --- what the base says ------------------------------------------------------------------------------


def teacher(
    tree: TrainingTree,
    head: TargetRows | None,
    rows: Sequence[Encoded],
    out: list[Rehearsed],
    *,
    together: int = TOGETHER,
    top: int = TOP,
) -> Iterator[Piece]:
    """Append to `out` each of `rows` with the distributions of `tree`, in order; rows without targets are left out.

    `tree` must say what the base says: one as `make_tree` gives it, before anything is loaded or learnt. At most
    `together` tokens go through it at once, or one row. If it has a prefix, what that makes of the rows is kept.
    """
    rows = [row for row in rows if row.targets > 0]
    made: dict[int, Rehearsed] = {}
    for places in of_like_length(rows, together):
        chunk = [rows[i] for i in places]
        batch = as_batch(chunk)
        hidden: list[mx.array] = []
        if tree.prefix is not None:
            yield from _below(tree, batch, hidden)
        logits, _ = quiet_logits(tree, head, batch, *hidden)
        kept = likeliest(logits, top)
        yield from noted(tree)
        computed = [logits, *kept]
        del logits
        yield from in_order(computed)
        taught = list(_split(chunk, *map(np.array, kept)))
        if hidden:
            taught = _begun(taught, hidden.pop())
            yield Piece([r.hidden for r in taught if r.hidden is not None], barrier=True)
        made.update(zip(places, taught, strict=True))
    out.extend(_sharing([made[i] for i in range(len(rows))]))


def begin(tree: TrainingTree, rows: Sequence[Rehearsed], out: list[Rehearsed]) -> Iterator[Piece]:
    """Append to `out` each of `rows` with what the prefix of `tree`, which it must have, makes of it, in order."""
    made: dict[int, Rehearsed] = {}
    for places in of_like_length([r.row for r in rows], TOGETHER):
        chunk, hidden = [rows[i] for i in places], list[mx.array]()
        yield from _below(tree, as_batch([r.row for r in chunk]), hidden)
        begun = _begun(chunk, hidden.pop())
        yield Piece([r.hidden for r in begun if r.hidden is not None], barrier=True)
        made.update(zip(places, begun, strict=True))
    out.extend(_sharing([made[i] for i in range(len(rows))]))


def _sharing(rows: Sequence[Rehearsed]) -> list[Rehearsed]:
    """`rows`, those of equal inputs with one `hidden`: they are kept once, and come back as they went."""
    first: dict[bytes, mx.array | None] = {}
    return [replace(r, hidden=first.setdefault(row_key(r.row.tokens[:-1]), r.hidden)) for r in rows]


def _below(tree: TrainingTree, batch: Batch, out: list[mx.array]) -> Iterator[Piece]:
    assert tree.prefix is not None
    out.append(tree.prefix.compute(batch[0][:, :-1]))
    yield from noted(tree)
    yield Piece(out, barrier=True)


def _begun(rows: Sequence[Rehearsed], hidden: mx.array) -> list[Rehearsed]:
    """`rows` with their own part of `hidden` (rows, length, dims)."""
    parts = rows_of(hidden, [r.row for r in rows])
    return [replace(r, hidden=part) for r, part in zip(rows, parts, strict=True)]


def sureness(tree: TrainingTree, head: TargetRows | None, rows: Sequence[Encoded], out: list[float]) -> Iterator[Piece]:
    """Append to `out` the log-probability of what `tree` finds likeliest at each row's only target, in order."""
    made: dict[int, float] = {}
    for places in of_like_length(rows, TOGETHER):
        logits, _ = quiet_logits(tree, head, as_batch([rows[i] for i in places]))
        logits = logits.astype(mx.float32)
        surest = logits.max(axis=-1) - mx.logsumexp(logits, axis=-1)
        yield from noted(tree)
        del logits
        yield Piece([surest], barrier=True)
        made.update(zip(places, surest.tolist(), strict=True))
    out.extend(made[i] for i in range(len(rows)))


def _split(rows: Sequence[Encoded], ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray) -> Iterator[Rehearsed]:
    """The arrays of all targets, row after row, as rows again."""
    ends = list(itertools.accumulate(row.targets for row in rows))
    for row, end in zip(rows, ends, strict=True):
        own = slice(end - row.targets, end)
        yield Rehearsed(row, ids[own], logprobs[own], tail[own])


# --- the loss ----------------------------------------------------------------------------------------


class RehearsalLoss:
    """The divergence as a loss for `MicroBatch`, weighted; over target rows only where the head allows it."""

    def __init__(self, tree: TrainingTree, head: TargetRows | None, kl_weight: float) -> None:
        self._tree, self._head, self._weight = tree, head, kl_weight

    def __call__(
        self,
        module: nn.Module,
        tokens: mx.array,
        spans: mx.array,
        ids: mx.array,
        logprobs: mx.array,
        tail: mx.array,
        of: int,
    ) -> tuple[mx.array, int]:
        """(`kl_weight` · Σ KL / `of`, number of targets): a step's micro-batches add up to its weighted mean."""
        losses = losses_at_targets(self._tree, self._head, (tokens, spans), DIVERGENCE, [ids, logprobs, tail])
        return self._weight * losses.sum() / of, len(tail)


# --- the rows of each step ---------------------------------------------------------------------------


class Rehearsal:
    """What is rehearsed while one batch is learnt: `rows` rows of one source in each optimizer step, in `turns`.

    Rows of two sources in one step are mostly of two widths, and cost two passes over the weights. With `row_targets`
    no more targets than that come of a row at a time: it is divided into parts, and one is drawn each time.
    """

    def __init__(
        self, sources: Sequence[Source], *, kl_weight: float, rows: int, row_targets: int | None = None
    ) -> None:
        if kl_weight < 0 or rows < 0 or any(source.share < 0 for source in sources):
            raise ValueError("kl_weight, rows and shares must not be negative")
        self.kl_weight = kl_weight
        self.rows, self._row_targets = rows, row_targets
        self.sources = [s for s in sources if s.rows and s.share > 0]

    @property
    def active(self) -> bool:
        """Whether there is anything to rehearse."""
        return self.kl_weight > 0 and self.rows > 0 and bool(self.sources)

    @property
    def begun(self) -> bool:
        """Whether of any row it is kept what the prefix makes of it."""
        return any(r.hidden is not None for source in self.sources for r in source.rows)

    def forget_hidden(self) -> None:
        """Begin at the beginning: the prefix that made what is kept is not the one of the tree that learns."""
        self.sources = [replace(s, rows=[replace(r, hidden=None) for r in s.rows]) for s in self.sources]

    def steps(
        self, *, batch_size: int, max_tokens: int, seed: tuple[int, int], start: int = 0
    ) -> Iterator[list[Begun]]:
        """The micro-batches of each optimizer step from `start` on, without end; a function of the arguments alone.

        Rows longer than `max_tokens` are left out (with none left, the lists are empty).
        """
        kept = [[r for r in s.rows if len(r.row.tokens) <= max_tokens] for s in self.sources]
        sources = [(rows, s.share) for rows, s in zip(kept, self.sources, strict=True) if rows]
        if not sources:
            yield from itertools.repeat([])
            return
        orders = [
            _alike([len(r.row.tokens) for r in rows], self.rows, (*seed, place))
            for place, (rows, _) in enumerate(sources)
        ]
        for step, place in enumerate(turns([share for _, share in sources])):
            chosen = list(itertools.islice(orders[place], self.rows))
            if step >= start:
                drawn = np.random.default_rng([*seed, _PARTS, step])
                yield _batches([self._some_of(sources[place][0][i], drawn) for i in chosen], batch_size)

    def _some_of(self, row: Rehearsed, drawn: np.random.Generator) -> Rehearsed:
        parts = -(-row.row.targets // self._row_targets) if self._row_targets else 1
        return row.part(int(drawn.integers(parts)), parts) if parts > 1 else row


def _alike(lengths: Sequence[int], block: int, seed: Sequence[int]) -> Iterator[int]:
    """Places of rows without end, each once per epoch, in random blocks of `block` rows of like length.

    A micro-batch is as wide as its longest row: rows of all lengths together would cost twice the time.
    """
    for epoch in itertools.count():
        rng = np.random.default_rng([*seed, _ROWS, epoch])
        order = sorted(rng.permutation(len(lengths)).tolist(), key=lambda i: buckets(lengths[i]))
        starts = range(0, len(order), block)
        for i in rng.permutation(len(starts)).tolist():
            yield from order[starts[i] : starts[i] + block]


def _batches(rows: Sequence[Rehearsed], batch_size: int) -> list[Begun]:
    """One step's rows as micro-batches of rows of like length, the shortest first, each of what goes `together`."""
    ordered = sorted(rows, key=lambda r: len(r.row.tokens))
    targets = sum(r.row.targets for r in ordered)
    made: list[Begun] = []
    for _, alike in itertools.groupby(ordered, key=lambda r: buckets(len(r.row.tokens))):
        group = list(alike)
        most = together(len(group[-1].row.tokens), batch_size)
        made += [_batch(group[i : i + most], targets) for i in range(0, len(group), most)]
    return made


def together(length: int, batch_size: int) -> int:
    """How many rehearsed rows of at most `length` tokens share a micro-batch."""
    return max(batch_size, REHEARSED_TOGETHER // padded(length - 1))


def _batch(rows: Sequence[Rehearsed], targets: int) -> Begun:
    tokens, spans = as_batch([r.row for r in rows])
    ids, logprobs, tail = (
        mx.array(np.concatenate([getattr(r, name) for r in rows])) for name in ("ids", "logprobs", "tail")
    )
    hidden = [r.hidden for r in rows if r.hidden is not None]
    begun = side_by_side(hidden, tokens.shape[1] - 1) if len(hidden) == len(rows) else None
    return (tokens, spans, ids, logprobs, tail, targets), begun


# --- on disk -----------------------------------------------------------------------------------------


def save_rows(folder: Path, rows: Sequence[Rehearsed], facts: Mapping[str, Any]) -> None:
    """Write `rows` (without `hidden`) into an existing folder, with `facts` (plain values) of how they came about."""
    arrays = {}
    if rows:
        arrays = {name: np.concatenate([getattr(r, name) for r in rows]) for name in ("ids", "logprobs", "tail")}
        arrays["tokens"] = np.concatenate([np.array(r.row.tokens, dtype=np.int32) for r in rows])
    save_arrays(folder / ARRAYS_FILE, {name: mx.array(values) for name, values in arrays.items()})
    shapes = [[len(r.row.tokens), r.row.offset] for r in rows]
    (folder / ROWS_FILE).write_text(json.dumps({"facts": dict(facts), "rows": shapes}) + "\n", encoding="utf-8")


def load_rows(folder: Path) -> tuple[list[Rehearsed], dict[str, Any]]:
    """What `save_rows` wrote: the rows and the facts. Raises `CheckpointDamaged`."""
    try:
        document = json.loads((folder / ROWS_FILE).read_text(encoding="utf-8"))
        shapes = [(int(length), int(offset)) for length, offset in document["rows"]]
        facts = dict(document["facts"])
        if not shapes:
            return [], facts
        arrays = {name: np.array(values) for name, values in load_arrays(folder / ARRAYS_FILE).items()}
        starts = itertools.accumulate((length for length, _ in shapes), initial=0)
        rows = [
            Encoded(tuple(arrays["tokens"][start : start + length].tolist()), offset)
            for start, (length, offset) in zip(starts, shapes, strict=False)
        ]
        counted = {sum(row.targets for row in rows)} | {sum(len(row.tokens) for row in rows)}
        if {len(arrays["tail"]), len(arrays["tokens"])} != counted:
            raise ValueError("arrays and rows do not fit together")
        if not all(np.isfinite(arrays[name]).all() for name in ("logprobs", "tail")):
            raise ValueError("some probabilities are no numbers")
        return list(_split(rows, arrays["ids"], arrays["logprobs"], arrays["tail"])), facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{folder} holds no rehearsal rows: {error}") from error


def save_hidden(folder: Path, rows: Sequence[Rehearsed], depth: str) -> Iterator[Piece]:
    """Write beside the `rows` of `folder` what a prefix of this `depth` makes of them, if all have it."""
    hidden = {row_key(r.row.tokens[:-1]): r.hidden for r in rows if r.hidden is not None}
    if rows and all(r.hidden is not None for r in rows):
        for _ in save_kept(folder / HIDDEN, hidden, depth):
            yield Piece([], barrier=True)


def with_hidden(
    folder: Path, rows: Sequence[Rehearsed], depth: str, limit: int, out: list[Rehearsed]
) -> Iterator[Piece]:
    """Append to `out` the `rows` of `folder` with what `save_hidden` wrote of them.

    As they are, if that is not whole or does not fit into `limit` bytes.
    """
    keys = [row_key(r.row.tokens[:-1]) for r in rows]
    kept: dict[bytes, mx.array] = {}
    fits = size_of(folder / HIDDEN) <= limit
    for part in load_kept(folder / HIDDEN, depth, limit, set(keys)) if fits else ():
        kept.update(part)
        yield Piece([], barrier=True)
    whole = all(key in kept for key in keys)
    out += [replace(r, hidden=kept[key]) for r, key in zip(rows, keys, strict=True)] if whole else rows
