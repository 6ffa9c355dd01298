"""Anchors from a data set on the hub or on this disk."""

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import AnchorsUnavailable
from ..messages import Example
from ..rows.hub import Asking, open_split, reading
from .anchor_rows import columns_of

ASKING = Asking(
    AnchorsUnavailable,
    AnchorsUnavailable,
    "anchor data set",
    "evaluation.anchor_dataset",
    "evaluation.anchor_split",
    ", or set evaluation.anchor_provider to local or none",
)


def rows_of(dataset: str, split: str, columns: Sequence[str], drawn: Callable[[int], list[int]]) -> list[Example]:
    """Those rows of `split` that `drawn` picks, given how many there are; only they become Python objects.

    `dataset` as `open_split` takes it, `columns` as `columns_of` takes them. A row without usable text is an empty
    `Example`. Raises `AnchorsUnavailable`.
    """
    with reading(dataset, ASKING):
        table = open_split(dataset, split, ASKING)
        kinds = {name: _holds_strings(feature) for name, feature in table.features.items()}
        found = columns_of(kinds, columns)
        rows = table.select_columns(found.names).select(drawn(len(table)))
        return [found.example(row) for row in rows]


def _holds_strings(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")
