"""The adapter bank: many adapters beside one base, applied row by row in one batch.

Each target linear of the serving tree becomes a `BankLinear`: the base linear and stacks `a: (slots, in, r)`
and `b: (slots, r, out)` in float32; `mx.gather_mm` takes each batch row's adapter by its slot. Where all rows have
the same, that one's low-rank product is taken of all of them together. Slot 0 is the base: zeros. The rows' slots
are set on `ActiveRows` before each forward pass.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .targets import LINEAR, input_dims

BASE_SLOT = 0


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter in memory: for each module path `a: (in, r)` and `b: (r, out)`, float32; `scale` multiplies."""

    weights: Mapping[str, tuple[mx.array, mx.array]]
    scale: float

    @property
    def rank(self) -> int:
        """The largest rank of all modules."""
        return max(a.shape[1] for a, _ in self.weights.values())


class RowSlots:
    """The slots of a batch's rows: `each`, (batch,) uint32, and `only`, the one that all of them have, or None."""

    __slots__ = ("each", "only")

    def __init__(self, slots: Sequence[int]) -> None:
        self.each = mx.array(slots, dtype=mx.uint32)
        self.only = slots[0] if len(set(slots)) == 1 else None


class ActiveRows:
    """Which slot each row of the running batch uses; None when all are base.

    `paths` are those of the modules that look it up.
    """

    def __init__(self) -> None:
        self.slots: RowSlots | None = None
        self.paths: set[str] = set()


class Parts:
    """Of the stacks, by slot: (in, r) and (r, out). An object, for of a dict MLX would make a child of the module."""

    def __init__(self) -> None:
        self.pairs: dict[int, tuple[mx.array, mx.array]] = {}


class BankLinear(nn.Module):
    """A base linear with one adapter per slot."""

    def __init__(self, linear: nn.Module, slots: int, rank: int, rows: ActiveRows) -> None:
        super().__init__()
        self.linear = linear
        self.a = mx.zeros((slots, input_dims(linear), rank))
        self.b = mx.zeros((slots, rank, linear.weight.shape[0]))
        self._rows = rows
        self._parts = Parts()

    def __call__(self, x: mx.array) -> mx.array:
        """`linear(x)` plus each row's low-rank product; x: (batch, …, length, in)."""
        y, slots = self.linear(x), self._rows.slots
        if slots is None:
            return y
        if slots.only is not None:
            a, b = self._pair(slots.only)
            return y + (x @ a @ b).astype(y.dtype)
        each = slots.each.reshape(-1, *[1] * (x.ndim - 3))
        low = mx.gather_mm(x, self.a, rhs_indices=each)
        return y + mx.gather_mm(low, self.b, rhs_indices=each).astype(y.dtype)

    def _pair(self, slot: int) -> tuple[mx.array, mx.array]:
        """What `slot` holds, parts of the stacks; made once, for they are asked for by every step."""
        pairs = self._parts.pairs
        if slot not in pairs:
            this = slice(slot, slot + 1)  # shares the memory, where an index would copy
            pairs[slot] = self.a[this].squeeze(0), self.b[this].squeeze(0)
        return pairs[slot]

    def let_go(self) -> None:
        """Hold no part of the stacks, which are about to change: they would be copied whole."""
        self._parts.pairs.clear()


class Bank:
    """All `BankLinear`s of one serving tree. Slots are plain numbers; who uses which is the caller's affair."""

    def __init__(self, tree: nn.Module, paths: Iterable[str], slots: int, rank: int) -> None:
        self.rows = ActiveRows()
        self.slots = slots
        self.rank = rank
        self._tree = tree
        self._linears: dict[str, BankLinear] = {}
        self._adopt(paths)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the modules that the bank covers."""
        return tuple(self._linears)

    @property
    def nbytes(self) -> int:
        """Bytes of all stacks."""
        return sum(m.a.nbytes + m.b.nbytes for m in self._linears.values())

    def linear(self, path: str) -> BankLinear:
        """The banked linear at `path`."""
        return self._linears[path]

    def write(self, slot: int, adapter: AdapterWeights) -> None:
        """Fill `slot`; the scale is folded into `b`, a smaller rank padded with zeros, absent modules zeroed.

        Grows the bank when the adapter has modules or a rank that it lacks. Returns when the weights are
        in place. Raises `KeyError` for a path that the tree has not.
        """
        self._adopt(path for path in adapter.weights if path not in self._linears)
        if adapter.rank > self.rank:
            self._widen(adapter.rank)
        mx.synchronize()  # nothing unevaluated may hold the stacks, or each write copies them whole
        for path, module in self._linears.items():
            module.let_go()
            pair = adapter.weights.get(path)
            if pair is None:
                module.a[slot], module.b[slot] = mx.array(0.0), mx.array(0.0)
            else:
                a, b = pair
                spare = self.rank - a.shape[1]
                module.a[slot] = mx.pad(a.astype(mx.float32), ((0, 0), (0, spare)))
                module.b[slot] = mx.pad(b.astype(mx.float32) * adapter.scale, ((0, spare), (0, 0)))
            mx.eval(module.a, module.b)

    def _adopt(self, paths: Iterable[str]) -> None:
        new = list(paths)
        if not new:
            return
        modules = dict(self._tree.named_modules())
        wrong = [path for path in new if not isinstance(modules.get(path), LINEAR)]
        if wrong:
            raise KeyError(f"the model has no linear called {', '.join(wrong)}")
        added = {path: BankLinear(modules[path], self.slots, self.rank, self.rows) for path in new}
        self._tree.update_modules(tree_unflatten(list(added.items())))
        self._linears.update(added)
        self.rows.paths.update(added)
        mx.eval([m.a for m in added.values()], [m.b for m in added.values()])

    def _widen(self, rank: int) -> None:
        spare = rank - self.rank
        for module in self._linears.values():
            module.let_go()
            module.a = mx.pad(module.a, ((0, 0), (0, 0), (0, spare)))
            module.b = mx.pad(module.b, ((0, 0), (0, spare), (0, 0)))
            mx.eval(module.a, module.b)
        self.rank = rank
