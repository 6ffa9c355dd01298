"""Rows of a data set on the hub or on this disk, by `datasets`, which is imported when the first one is asked for.

`datasets` and `huggingface_hub` take no setting by call that would bound their retries, and this process sets
none for all: whether the hub knows the data set is asked first, once and with a time limit, and a copy that was
made earlier is read without asking.
"""

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..config.bases import expanded
from ..errors import AnchorsUnavailable
from ..messages import Example
from .anchor_rows import columns_of

HUB_TIMEOUT_S = 10.0
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def rows_of(dataset: str, split: str, columns: Sequence[str], drawn: Callable[[int], list[int]]) -> list[Example]:
    """Those rows of `split` that `drawn` picks, given how many there are; only they become Python objects.

    `dataset` is a hub name, a folder with data files, or one file of a kind in `BUILDERS`; `columns` as
    `columns_of` takes them. A row without usable text is an empty `Example`. Raises `AnchorsUnavailable`.
    """
    try:
        with _no_progress_bars():
            builder = _builder(dataset)
            builder.download_and_prepare()
            table = _split(builder, dataset, split)
            kinds = {name: _holds_strings(feature) for name, feature in table.features.items()}
            found = columns_of(kinds, columns)
            rows = table.select_columns(found.names).select(drawn(len(table)))
            return [found.example(row) for row in rows]
    except AnchorsUnavailable:
        raise
    except Exception as error:  # datasets, arrow, the hub and the network each raise their own
        raise AnchorsUnavailable(
            f"The anchor data set {dataset} cannot be read: {_reason(error)}",
            "Check evaluation.anchor_dataset and the network (HF_TOKEN for data sets that ask for it), give a local "
            "folder or file there, or set evaluation.anchor_provider to local or none.",
        ) from error


def _builder(dataset: str) -> Any:
    """What `datasets` reads `dataset` with."""
    import datasets

    path = expanded(dataset)
    if dataset and path.is_dir():  # an empty name would be the folder that this process happens to be in
        return datasets.load_dataset_builder(str(path))
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise AnchorsUnavailable(
                f"The anchor file {path} is of no known kind.", f"Kinds that can be read: {', '.join(BUILDERS)}."
            )
        return datasets.load_dataset_builder(BUILDERS[path.suffix.lower()], data_files=glob.escape(str(path)))
    if not HUB_NAME.fullmatch(dataset) or path.suffix.lower() in BUILDERS:
        raise AnchorsUnavailable(
            f"There is no anchor data set {dataset}: no such folder or file.",
            "evaluation.anchor_dataset is a hub name (owner/name), a folder, or one file.",
        )
    try:
        _ask_the_hub(dataset)
    except Exception:
        if (kept := _kept_copy(dataset)) is None:
            raise
        return kept
    return datasets.load_dataset_builder(dataset)


def _ask_the_hub(name: str) -> None:
    """Raises what the hub or the network says, after `HUB_TIMEOUT_S` at most for each wait."""
    import datasets
    from huggingface_hub import HfApi

    HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, timeout=HUB_TIMEOUT_S)


def _kept_copy(name: str) -> Any:
    """What reads the copy that `datasets` made of a hub's data set earlier, or None."""
    from datasets.packaged_modules.cache.cache import Cache

    try:
        return Cache(dataset_name=name.split("/")[-1], repo_id=name, version="auto", hash="auto")
    except Exception:  # there is none, or several that cannot be told apart
        return None


def _split(builder: Any, dataset: str, split: str) -> Any:
    try:
        return builder.as_dataset(split=split)
    except ValueError as error:
        if split in (builder.info.splits or ()):
            raise
        raise AnchorsUnavailable(
            f"The anchor data set {dataset} has no split {split}; it has: {', '.join(builder.info.splits or ())}.",
            "Name one of them in evaluation.anchor_split.",
        ) from error


def _holds_strings(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first: `datasets` wraps it in an error that says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """They would run through the service's log."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()
