"""Data sets on the hub or on this disk, by `datasets`, which is imported when the first one is asked for.

`datasets` and `huggingface_hub` take no setting by call that would bound their retries, and this process sets
none for all: whether the hub knows the data set is asked first, once and with a time limit, and a copy that was
made earlier is read without asking.
"""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..config.bases import expanded
from ..errors import DatasetUnavailable, InvalidRequest, RadianceError
from .files import Row, Source

HUB_TIMEOUT_S = 10.0
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
#: how `huggingface_hub` and `datasets` call it; they may be what could not be imported
ABSENT = frozenset({"RepositoryNotFoundError", "DatasetNotFoundError"})
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Asking:
    """Who asks for a data set, for errors: their classes, what it is called, and the settings that name it.

    `error` is for what cannot be had now, `wrong` for what is not there, or not of a kind that can be read.
    """

    error: type[RadianceError] = DatasetUnavailable
    wrong: type[RadianceError] = InvalidRequest
    what: str = "data set"
    name_setting: str = "--dataset"
    split_setting: str = "--split"
    more_hint: str = ""


@contextmanager
def reading(dataset: str, asking: Asking) -> Iterator[None]:
    """Inside, no progress bar is shown, and whatever goes wrong is told as `asking` wants it."""
    try:
        with _no_progress_bars():
            yield
    except RadianceError:
        raise
    except Exception as error:  # datasets, arrow, the hub and the network each raise their own
        raise (asking.wrong if _is_at_fault(dataset, error) else asking.error)(
            f"The {asking.what} {dataset} cannot be read: {_reason(error)}",
            f"Check {asking.name_setting} and the network (HF_TOKEN for data sets that ask for it), give a local "
            f"folder or file there{asking.more_hint}.",
        ) from error


def _is_at_fault(dataset: str, error: Exception) -> bool:
    """Whether the data set itself is what is wrong: one of this disk, or one that the hub says it has not."""
    return os.path.exists(expanded(dataset)) or any(kind.__name__ in ABSENT for kind in type(error).__mro__)


def open_split(dataset: str, split: str, asking: Asking) -> Any:
    """The split as a `datasets.Dataset`, on this disk; to be called inside `reading`.

    `dataset` is a hub name, a folder with data files, or one file of a kind in `BUILDERS`.
    """
    builder = _builder(dataset, asking)
    builder.download_and_prepare()
    return _split(builder, dataset, split, asking)


def _builder(dataset: str, asking: Asking) -> Any:
    """What `datasets` reads `dataset` with."""
    import datasets

    path = expanded(dataset)
    if dataset and path.is_dir():  # an empty name would be the folder that this process happens to be in
        return datasets.load_dataset_builder(str(path))
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise asking.wrong(
                f"The file {path} is of no known kind.", f"Kinds that can be read: {', '.join(BUILDERS)}."
            )
        return datasets.load_dataset_builder(BUILDERS[path.suffix.lower()], data_files=glob.escape(str(path)))
    if not HUB_NAME.fullmatch(dataset) or path.suffix.lower() in BUILDERS:
        raise asking.wrong(
            f"There is no {asking.what} {dataset}: no such folder or file.",
            f"{asking.name_setting} is a hub name (owner/name), a folder, or one file.",
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


def _split(builder: Any, dataset: str, split: str, asking: Asking) -> Any:
    try:
        return builder.as_dataset(split=split)
    except ValueError as error:
        if split in (builder.info.splits or ()):
            raise
        raise asking.wrong(
            f"The {asking.what} {dataset} has no split {split}; it has: {', '.join(builder.info.splits or ())}.",
            f"Name one of them in {asking.split_setting}.",
        ) from error


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


def source_of(dataset: str, split: str) -> Source:
    """The rows of a split, read one by one; class labels as their names.

    Raises `DatasetUnavailable`, or `InvalidRequest` for what is not there.
    """
    asking = Asking()
    with reading(dataset, asking):
        table = open_split(dataset, split, asking)

    def narrow(columns: list[str]) -> Iterator[Row]:
        with reading(dataset, asking):
            yield from _rows(table.select_columns(columns))  # images and sounds beside the text are not decoded

    names = list(table.column_names)
    return Source(f"{dataset} ({split})", "dataset", narrow(names), columns=names, narrow=narrow)


def _rows(table: Any) -> Iterator[Row]:
    labels = {name: feature for name, feature in table.features.items() if hasattr(feature, "int2str")}
    for number, row in enumerate(table):
        named = {name: labels[name].int2str(row[name]) for name in labels if row[name] not in (None, -1)}
        yield Row(f"row {number}", {**row, **named})
