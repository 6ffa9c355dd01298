"""One forward pass of an adapter over encoded documents, in pieces: what each counted token's distribution was.

Documents of like length share a pass; logits are computed for counted tokens only, where the head allows it.
All results are flat: one value for each counted token, documents in the order they were given.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..lora.batches import batches_once
from ..lora.encoding import Encoded
from ..lora.head import TargetRows
from ..lora.step import Piece, in_order, noted, quiet_logits
from ..lora.tree import TrainingTree
from .divergence import TOP_K, Reference, agreement, kl, log_softmax, reference

#: tokens that one pass takes, padding included: the pause that its unsliceable rest makes is bounded by it
PASS_TOKENS = 512


class Documents:
    """Encoded documents, and where each one's counted tokens are in a flat array. Each has at least one."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self.encoded = tuple(encoded)
        self.counts = np.array([e.targets for e in self.encoded], dtype=np.int64)
        if not self.encoded or (self.counts < 1).any():
            raise ValueError("every document needs a token that counts, and there must be a document")
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])

    @property
    def tokens(self) -> int:
        """Counted tokens in all."""
        return int(self.counts.sum())

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(tokens,) → (documents,)."""
        return np.asarray(np.add.reduceat(values, self.starts))

    def rows(self, documents: Sequence[int]) -> np.ndarray:
        """Flat indices of the counted tokens of these documents, in the order given."""
        return np.concatenate([np.arange(self.starts[i], self.starts[i] + self.counts[i]) for i in documents])

    def groups(self) -> Iterator[list[int]]:
        """Documents that share a pass: of like length, at most `PASS_TOKENS` together (or one alone)."""
        group: list[int] = []
        for i in sorted(range(len(self.encoded)), key=lambda i: len(self.encoded[i].tokens)):
            if group and (len(group) + 1) * len(self.encoded[i].tokens) > PASS_TOKENS:
                yield group
                group = []
            group.append(i)
        yield group


@dataclass
class Measured:
    """What `measure` fills: (tokens,) float32 each, `kl` and `agreement` by the name of the reference."""

    target: np.ndarray  # log-probability of the token that came
    kl: dict[str, np.ndarray] = field(default_factory=dict)
    agreement: dict[str, np.ndarray] = field(default_factory=dict)
    own: Reference | None = None

    @classmethod
    def empty(cls, documents: Documents, against: Sequence[str] = ()) -> "Measured":
        """Room for all tokens of `documents`."""

        def room() -> np.ndarray:
            return np.zeros(documents.tokens, dtype=np.float32)

        return cls(room(), {name: room() for name in against}, {name: room() for name in against})


def measure(
    tree: TrainingTree,
    head: TargetRows | None,
    documents: Documents,
    against: Mapping[str, Reference],
    out: Measured,
    *,
    keep: bool = False,
    k: int = TOP_K,
) -> Iterator[Piece]:
    """Fill `out` (made with the names of `against`); with `keep`, its `own` reference too.

    A generator of pieces: whoever drives it evaluates each before asking for the next barrier's successor.
    The tree's adapter is applied without dropout.
    """
    kept: dict[str, np.ndarray] = {}
    for group in documents.groups():
        rows = documents.rows(group)
        encoded = [documents.encoded[i] for i in group]
        [batch] = batches_once(encoded, batch_size=len(group), max_tokens=max(len(e.tokens) for e in encoded))
        logits, targets = quiet_logits(tree, head, batch)
        yield from noted(tree)
        logprobs = log_softmax(logits)
        found = reference(logprobs, mx.array(targets), k)
        compared = {name: _compared(ref, mx.array(rows), logprobs) for name, ref in against.items()}
        arrays = found.arrays() if keep else {"target": found.target}
        computed = [logits, logprobs, *arrays.values(), *(array for pair in compared.values() for array in pair)]
        del logits, logprobs  # large with a large vocabulary, and each of what comes of them takes a while
        yield from in_order(computed)
        out.target[rows] = np.array(found.target)
        for name, (divergence, same) in compared.items():
            out.kl[name][rows], out.agreement[name][rows] = np.array(divergence), np.array(same)
        if keep:
            _keep(kept, arrays, rows, documents.tokens)
    if keep:
        out.own = Reference(**{name: mx.array(array) for name, array in kept.items()})
        yield Piece(list(out.own.arrays().values()), barrier=True)


def _compared(ref: Reference, rows: mx.array, logprobs: mx.array) -> tuple[mx.array, mx.array]:
    part = Reference(**{name: array[rows] for name, array in ref.arrays().items()})
    return kl(part, logprobs), agreement(part, logprobs)


def _keep(kept: dict[str, np.ndarray], arrays: Mapping[str, mx.array], rows: np.ndarray, tokens: int) -> None:
    for name, array in arrays.items():
        values = np.array(array)
        kept.setdefault(name, np.zeros((tokens, *values.shape[1:]), dtype=values.dtype))[rows] = values
