"""`serving.fuse`: the stable checkpoint folded into weights of its own, beside the bank.

That spares each step the low-rank products, and takes the targets' weights once more (in full precision, where the
base is quantised). The folded tree answers while every row of the batch is the stable checkpoint's; a mixed batch
uses the bank, since two passes would read all weights twice. A row may go from one to the other between two tokens:
they differ by rounding. Half-precision weights have few digits, and a small change can be lost in them: what would lose
more than `LOSS` of it is not folded. Training has precedence: what is folded gives way to a batch that needs the room.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..lora.bank import AdapterWeights, Bank, RowSlots
from ..lora.head import TargetRows, serve_places
from ..lora.memory import readable
from ..lora.step import Piece
from .fusing import LOSS, fold, folded_bytes, rounding, share_lost
from .products import UNKNOWN, Best, shape_products, use_threads
from .slices import Slices, reason

log = logging.getLogger(__name__)
#: `auto` folds if the folded linears take at most so much of the bank's time
WORTH_IT = 0.98
_REPEATS = 12


class FusedStable:
    """Belongs to the engine's thread. `tree` answers for the checkpoint `name`, once it is there."""

    def __init__(
        self,
        base: nn.Module,
        bank: Bank,
        mode: Literal["auto", "off", "always"],
        room: Callable[[], int],
        products: Best = UNKNOWN,
        base_head: TargetRows | None = None,
    ) -> None:
        """`room` tells how many bytes may still be taken for it; `products` is how they are multiplied.

        Where `base_head` takes single places, `head`, that of the tree, does, too.
        """
        self._products, self._base_head = products, base_head
        self.head: TargetRows | None = None
        self._base, self._bank, self._mode, self._room = base, bank, mode, room
        self._folding: Slices | None = None
        self._worth: bool | None = None  # of quantised weights, as far as it has been measured
        self.name: str | None = None
        self.tree: nn.Module | None = None
        self.why_not = "" if mode != "off" else "serving.fuse is off"
        self.nbytes = 0

    def follow(self, name: str | None, load: Callable[[], AdapterWeights]) -> None:
        """The stable checkpoint is `name` from now on (None: the base). What was folded goes at once."""
        if name is not None and name == self.name:
            return
        self._let_go("serving.fuse is off" if self._mode == "off" else "")
        if name is not None and self._mode != "off":
            self._folding = Slices(self._pieces(name, load), lambda: None)

    def give_way(self) -> None:
        """Its memory is needed: the bank answers until another checkpoint is stable."""
        self._let_go("training needs the memory")

    def _let_go(self, why: str) -> None:
        self.name = self.tree = self.head = self._folding = None
        self.nbytes, self.why_not = 0, why

    @property
    def pending(self) -> bool:
        """Whether there is something to fold."""
        return self._folding is not None

    def slice(self, seconds: float) -> None:
        """Fold for about `seconds`. A fault is logged, and the bank goes on to answer."""
        assert self._folding is not None
        try:
            if not self._folding.run(seconds):
                return
        except Exception as error:
            self._refuse(f"folding failed: {reason(error)}")
        self._folding = None
        if self.tree is None:
            self.nbytes = 0

    def facts(self) -> dict[str, Any]:
        """For `/info`."""
        return {"fused": self.name, "fused_bytes": self.nbytes, "not_fused": self.why_not or None}

    # --- folding ---------------------------------------------------------------------------------

    def _refuse(self, why: str) -> None:
        self.why_not = why
        if self._mode == "always":
            log.warning("the stable checkpoint is not folded: %s", why)

    def _pieces(self, name: str, load: Callable[[], AdapterWeights]) -> Iterator[Piece]:
        adapter = load()
        modules = dict(self._base.named_modules())
        needed, room = sum(folded_bytes(modules[path]) for path in adapter.weights), self._room()
        if needed > room:
            self._refuse(f"its weights take {readable(needed)}, and {readable(max(room, 0))} may be taken")
            return
        self.nbytes = needed
        # of plain weights they are the same products without the low-rank ones: there is nothing to be measured
        asked = self._mode == "auto" and any(type(modules[path]) is not nn.Linear for path in adapter.weights)
        if asked and self._worth is None:
            yield from self._measure(modules, adapter)
        if asked and not self._worth:
            self._refuse("for this base it was measured to be no faster than the bank")
            return
        folded, lost, whole = [], 0.0, 0.0
        for path, (a, b) in adapter.weights.items():
            plain = fold(modules[path], a, b, adapter.scale)
            off, change = rounding(modules[path], plain, a, b, adapter.scale)
            yield Piece([plain.weight, off, change], barrier=True)
            folded.append((path, plain))
            lost, whole = lost + off.item(), whole + change.item()
        if not (share := share_lost(lost, whole)) <= LOSS:  # nor what is no number
            self._refuse(f"its weights would lose {share:.0%} of what was learnt by rounding")
            return
        tree = copy.deepcopy(self._base)
        tree.update_modules(tree_unflatten(folded))
        tree.eval()
        shape_products(tree, self._products)
        self.head = serve_places(tree, self._base_head)
        self.name, self.tree, self.why_not = name, tree, ""

    def _measure(self, modules: dict[str, nn.Module], adapter: AdapterWeights) -> Iterator[Piece]:
        """One token through the linears of one layer, by the bank and folded, in turns; the fastest of each counts."""
        paths = list(adapter.weights)
        first = paths[len(paths) // 2].rpartition(".layers.")[2].partition(".")[0]
        paths = [path for path in paths if f".layers.{first}." in path] or paths[:1]
        best = {"bank": 0.0, "folded": 0.0}
        for path in paths:
            plain = fold(modules[path], *adapter.weights[path], adapter.scale)
            shape_products(plain, self._products)
            x = mx.zeros((1, 1, adapter.weights[path][0].shape[0]), plain.weight.dtype)
            yield Piece([plain.weight, x], barrier=True)
            times: dict[str, list[float]] = {name: [] for name in best}
            for _ in range(_REPEATS):
                times["bank"].append(self._timed(self._bank.linear(path), x, RowSlots([1])))
                times["folded"].append(self._timed(plain, x, None))
                yield Piece([], barrier=True)
            best = {name: best[name] + min(times[name]) for name in best}
        self._worth = best["folded"] <= WORTH_IT * best["bank"]

    def _timed(self, linear: nn.Module, x: mx.array, slots: RowSlots | None) -> float:
        use_threads(self._products.threads(1))
        self._bank.rows.slots = slots
        started = time.perf_counter()
        mx.eval(linear(x))
        self._bank.rows.slots = None
        return time.perf_counter() - started
