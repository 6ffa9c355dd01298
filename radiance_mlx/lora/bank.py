"""The adapter bank: many adapters beside one base, applied row by row in one batch.

Each target linear of the serving tree becomes a `BankLinear`: the base linear and stacks `a: (slots, in, r)`
and `b: (slots, r, out)` in float32; `mx.gather_mm` takes each batch row's adapter by its slot. Slot 0 is the
base: zeros. The rows' slots are set on `ActiveRows` before each forward pass.
"""

from collections.abc import Iterable, Mapping
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


class ActiveRows:
    """Which slot each row of the running batch uses: `slots` of shape (batch,), or None when all are base.

    `paths` are those of the modules that look it up.
    """

    def __init__(self) -> None:
        self.slots: mx.array | None = None
        self.paths: set[str] = set()


class BankLinear(nn.Module):
    """A base linear with one adapter per slot."""

    def __init__(self, linear: nn.Module, slots: int, rank: int, rows: ActiveRows) -> None:
        super().__init__()
        self.linear = linear
        self.a = mx.zeros((slots, input_dims(linear), rank))
        self.b = mx.zeros((slots, rank, linear.weight.shape[0]))
        self._rows = rows

    def __call__(self, x: mx.array) -> mx.array:
        """`linear(x)` plus each row's low-rank product; x: (batch, …, length, in)."""
        y = self.linear(x)
        slots = self._rows.slots
        if slots is None:
            return y
        slots = slots.reshape(-1, *[1] * (x.ndim - 3))
        low = mx.gather_mm(x, self.a, rhs_indices=slots)
        return y + mx.gather_mm(low, self.b, rhs_indices=slots).astype(y.dtype)


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
            module.a = mx.pad(module.a, ((0, 0), (0, 0), (0, spare)))
            module.b = mx.pad(module.b, ((0, 0), (0, spare), (0, 0)))
            mx.eval(module.a, module.b)
        self.rank = rank
