"""Anchors: a fixed set of texts that no update teaches, on which forgetting is measured.

They come from a data set (`hf`), from JSONL in the home or beside the base (`local`), or from nowhere (`none`).
The sample depends on the seed and the rows alone. No MLX here, and `datasets` only once `hf` rows are asked for.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from ..config.bases import expanded
from ..errors import AnchorsUnavailable, InvalidRequest
from ..lora.encoding import ChatEncoder, Encoded
from ..messages import Example
from ..rows import SHAPES
from ..rows.lines import understand_line
from .anchor_hub import rows_of

T = TypeVar("T")
OWN_FILE = "anchors.jsonl"


@dataclass(frozen=True)
class AnchorSettings:
    """Which anchors. `dataset`, `split` and `columns` are read by `hf`, `folder` by `local`.

    `sample` bounds the rows and `max_tokens` the tokens of each. `folder` may also be one JSONL file.
    """

    provider: Literal["hf", "local", "none"]
    dataset: str = ""
    split: str = "train"
    sample: int = 1000
    columns: tuple[str, ...] = ()
    max_tokens: int = 128
    seed: int = 0
    folder: Path = Path("data/anchors")

    @property
    def source(self) -> str:
        """Where they come from, for people."""
        return f"{self.dataset} ({self.split})" if self.provider == "hf" else str(self.folder)


@dataclass(frozen=True)
class AnchorSet:
    """Encoded anchors. `hash` stands for tokens, offsets and tokenizer; `skipped` rows had nothing to measure."""

    documents: tuple[Encoded, ...]
    source: str
    hash: str
    skipped: int

    @property
    def tokens(self) -> int:
        """How many tokens count, in all documents together."""
        return sum(document.targets for document in self.documents)


def own_anchors(base_folder: Path | None) -> Path | None:
    """The file of anchors that a base brings in its own folder, or None. It serves as `AnchorSettings.folder`."""
    file = base_folder / OWN_FILE if base_folder is not None else None
    return file if file is not None and file.is_file() else None


def signature(settings: AnchorSettings) -> tuple[tuple[str, int, int], ...]:
    """Name, size in bytes and time of change in ns of every local file that is read: equal while none changed.

    Empty for a hub's data set, and for files that are not there.
    """
    hub = settings.provider == "hf"
    if settings.provider == "none" or (hub and not settings.dataset):
        return ()
    path = expanded(settings.dataset) if hub else settings.folder
    try:
        files = sorted(path.rglob("*") if hub else path.glob("*.jsonl")) if path.is_dir() else [path]
        stats = [(str(file), file.stat()) for file in files if file.is_file()]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


# --- rows --------------------------------------------------------------------------------------------


def load_rows(settings: AnchorSettings) -> list[Example]:
    """The sample, at most `settings.sample` rows in the order of the source; none for the provider `none`.

    A row of a data set that holds no usable text is an empty `Example`. Blocks for as long as disk and network
    take. Raises `AnchorsUnavailable`.
    """
    if settings.provider == "none":
        return []
    if settings.provider == "local":
        return drawn(_written_rows(settings.folder), settings.sample, settings.seed)
    return rows_of(
        settings.dataset,
        settings.split,
        settings.columns,
        lambda count: drawn(range(count), settings.sample, settings.seed),
    )


def drawn(rows: Iterable[T], size: int, seed: int) -> list[T]:
    """`size` of `rows` (all, if there are fewer), each as likely as any other, in their order.

    Reservoir sampling (Vitter 1985, algorithm R): one pass, and only what is drawn is held.
    """
    rng = random.Random(seed)
    kept: list[tuple[int, T]] = []
    for i, row in enumerate(rows):
        if i < size:
            kept.append((i, row))
        elif (place := rng.randrange(i + 1)) < size:
            kept[place] = (i, row)
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]


def _written_rows(folder: Path) -> Iterator[Example]:
    """Every row of every `*.jsonl` in `folder`, files in the order of their names."""
    try:
        files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
    except OSError as error:  # a folder above that may not be entered
        raise AnchorsUnavailable(f"{folder} cannot be read: {error.strerror}.", "Check its permissions.") from error
    found = False
    for file in files:
        for row in _rows_of_file(file):
            found = True
            yield row
    if not found:
        raise AnchorsUnavailable(
            f"There are no anchors in {folder}.",
            f"Put files named *.jsonl there, one row a line: {SHAPES}. Or set evaluation.anchor_provider to none.",
        )


def _rows_of_file(file: Path) -> Iterator[Example]:
    try:
        with file.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield from _parsed(file, number, line)
    except OSError as error:
        raise AnchorsUnavailable(f"{file} cannot be read: {error.strerror}.", "Check its permissions.") from error


def _parsed(file: Path, number: int, line: bytes) -> tuple[Example, ...]:
    """Taken as `POST /update` takes an example, and refused for the same reasons."""
    try:
        return understand_line(line).examples
    except InvalidRequest as error:
        raise AnchorsUnavailable(
            f"{file}, line {number}: {error.message}.", f"One JSON object a line: {SHAPES}."
        ) from None


# --- tokens ------------------------------------------------------------------------------------------


def encode(rows: Iterable[Example], encoder: ChatEncoder, settings: AnchorSettings, fingerprint: str = "") -> AnchorSet:
    """All of `rows` at once: `encode_each` and `collect`."""
    return collect(encode_each(rows, encoder, settings), settings, fingerprint)


def encode_each(rows: Iterable[Example], encoder: ChatEncoder, settings: AnchorSettings) -> Iterator[Encoded | None]:
    """One item for each row, as soon as it is encoded; None for a row without a token that counts.

    Of a text every token but the first counts, of a chat its last answer's. A chat that the base's template
    refuses is None too.
    """
    for row in rows:
        encoded = None
        if row.messages or row.text.strip():
            try:
                encoded = encoder.example(row, max_tokens=settings.max_tokens)
            except InvalidRequest:
                encoded = None
        yield encoded if encoded is not None and encoded.targets > 0 else None


def collect(encoded: Iterable[Encoded | None], settings: AnchorSettings, fingerprint: str = "") -> AnchorSet:
    """What `encode_each` gave, as a set; `fingerprint` is the tokenizer's, for the hash.

    Raises `AnchorsUnavailable` if there is no document.
    """
    everything = list(encoded)
    documents = tuple(document for document in everything if document is not None)
    skipped = len(everything) - len(documents)
    if not documents:
        raise AnchorsUnavailable(
            f"None of the {skipped} rows of {settings.source} can serve as an anchor.",
            "A row needs a text of two tokens or more, or a chat that ends with an answer and that the base's chat "
            "template takes; name the right columns in evaluation.anchor_columns.",
        )
    return AnchorSet(documents, settings.source, _hash(documents, fingerprint), skipped)


def _hash(documents: tuple[Encoded, ...], fingerprint: str) -> str:
    digest = hashlib.sha256(json.dumps(fingerprint).encode())
    for document in documents:
        digest.update(json.dumps([document.offset, document.tokens]).encode())
    return digest.hexdigest()
