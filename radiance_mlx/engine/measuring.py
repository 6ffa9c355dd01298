"""Adapters measured on anchors as the engine's background work, one after another: what `eval` asks for."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import Cancelled
from ..evaluation.anchors import AnchorSet
from ..evaluation.plan import Subject
from ..lora import files
from ..lora.head import install_head
from ..lora.step import Piece
from ..lora.tree import adapter_tree, idle_adapter
from ..messages import BASE
from .evaluating import AnchorMeter
from .foundation import Foundation
from .slices import Slices


@dataclass(frozen=True, slots=True)
class Measurements:
    """`results[i]` belongs to the i-th subject: the names of `evaluation.metrics.NAMES`, and `intervals`."""

    results: tuple[dict[str, Any], ...]
    anchors: dict[str, Any]


class MeasuringTask:
    """Measures subjects in slices; `report(done, of)` is told after each."""

    def __init__(
        self,
        foundation: Foundation,
        anchors: AnchorSet,
        subjects: tuple[Subject, ...],
        report: Callable[[int, int], None],
        cancelled: threading.Event,
    ) -> None:
        self._base, self._targets, self._subjects = foundation.base, foundation.targets, subjects
        self._meter = AnchorMeter(foundation, anchors)
        self._report, self._cancelled = report, cancelled
        self._results: list[dict[str, Any]] = []
        self._slices = Slices(self._all_pieces(), self._check)

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("The evaluation was cancelled.")

    def _all_pieces(self) -> Iterator[Piece]:
        for subject in self._subjects:
            yield from self._pieces_of(subject)
            self._report(len(self._results), len(self._subjects))

    def _pieces_of(self, subject: Subject) -> Iterator[Piece]:
        """Raises `CheckpointDamaged` or `ModelError` for an adapter that cannot be measured."""
        module = self._base.module
        adapter = idle_adapter(module, self._targets) if subject.folder is None else files.load_adapter(subject.folder)
        tree = adapter_tree(module, adapter)
        found: dict[str, Any] = {}
        parent = None if subject.parent in (None, BASE) else subject.parent
        yield from self._meter.metrics(tree, install_head(tree.module, self._base.vocab_size), parent, found)
        self._results.append(found)

    @property
    def needs_base_asked(self) -> bool:
        """Whether what is asked ahead of updates is to come first."""
        return False

    def slice(self, seconds: float) -> Measurements | None:
        """Work for about `seconds`; the results when all is done."""
        if not self._slices.run(seconds):
            return None
        return Measurements(tuple(self._results), self._meter.facts())
