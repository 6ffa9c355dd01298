"""The frozen base, to be asked: what it says by itself and how it answers. What has been asked once is kept.

A base says the same to the same question, so all of this is a cache: what cannot be read is asked again.
"""

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import structlog

from ..checkpoints.folder import remove_unfinished, replace_folder, unfinished
from ..config.schema import RehearsalSection
from ..errors import CheckpointDamaged
from ..lora.encoding import ChatEncoder, Encoded
from ..lora.head import install_head
from ..lora.kept import load_kept, parts_of, save_kept
from ..lora.prefix import install_prefix
from ..lora.rehearsal import (
    HIDDEN,
    Rehearsed,
    begin,
    load_rows,
    save_hidden,
    save_rows,
    sureness,
    teacher,
    with_hidden,
)
from ..lora.step import Piece
from ..lora.targets import Targets
from ..lora.tree import TrainingTree, adapter_tree, idle_adapter
from ..store.files import write_durably
from .former import folder_of, leave_former
from .rewording import Wordings
from .speaking import say_anything

log = structlog.get_logger(__name__)


class Asked:
    """The frozen base, to be asked; what it says by itself is drawn once and kept in `folder`."""

    def __init__(
        self,
        module: nn.Module,
        vocab_size: int,
        encoder: ChatEncoder,
        targets: Targets,
        folder: Path,
        fingerprint: str,
        *,
        hidden_bytes: int = 0,
    ) -> None:
        self.module, self.encoder = module, encoder
        self._vocab_size, self._targets = vocab_size, targets
        self._limit = self._room = hidden_bytes
        self.folder = folder_of(folder, fingerprint)
        self.count = cache(self._count)
        self.asked_with = json.dumps(encoder.template_args, sort_keys=True, default=str)
        self._marks = tuple(encoder.tokenizer.all_special_tokens)

    def begin_ahead(self) -> bool:
        """Leave a mark that the base is being asked ahead; whether that may be done.

        Not where nothing can be kept, nor where the mark is there already: the process ended in the middle. Were it
        tried at every start, a base that cannot be asked here would never serve; an update has a count of its attempts.
        """
        if self._mark.exists():
            log.warning("asking the base ahead of updates was broken off last time: the next update asks")
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_durably(self._mark, b"")
        except OSError as error:
            _not_kept(self._mark, error)
            return False
        return True

    def end_ahead(self) -> None:
        """Take the mark away."""
        with contextlib.suppress(OSError):
            self._mark.unlink(missing_ok=True)

    @property
    def _mark(self) -> Path:
        return self.folder / "asking"

    @cached_property
    def depth(self) -> str:
        """Of the prefix that rows are kept from; empty where there is none."""
        prefix = self._tree(0, keeps=False).prefix if self._room else None
        return prefix.depth if prefix else ""

    def _tree(self, tokens: int, *, keeps: bool = True) -> TrainingTree:
        """The base, with a prefix that keeps rows of so many tokens while there is room."""
        tree = adapter_tree(self.module, idle_adapter(self.module, self._targets))
        install_prefix(tree, tokens, self._room, keeps=keeps)
        return tree

    def taught_by(self, rows: Sequence[Encoded], out: list[Rehearsed]) -> Iterator[Piece]:
        """Append `rows` with the base's own distributions to `out`, and with `hidden` while there is room."""
        tree = self._tree(sum(len(row.tokens) for row in rows))
        head = install_head(tree.module, self._vocab_size)
        taught: list[Rehearsed] = []
        yield from teacher(tree, head, rows, taught)
        self._room -= _hidden_bytes(taught)
        out += taught

    def least_sure(self, prompts: Sequence[list[int]], count: int, out: list[list[int]]) -> Iterator[Piece]:
        """Append to `out` the `count` prompts to which the base is least sure how to begin its answer.

        There the smallest push changes the answer.
        """
        begun: list[float] = []
        tree = adapter_tree(self.module, idle_adapter(self.module, self._targets))
        rows = [Encoded((*prompt, prompt[-1]), len(prompt)) for prompt in prompts]
        yield from sureness(tree, install_head(tree.module, self._vocab_size), rows, begun)
        order = sorted(range(len(prompts)), key=begun.__getitem__)
        out.extend(prompts[i] for i in sorted(order[:count]))

    def samples(self, settings: RehearsalSection, out: list[Rehearsed]) -> Iterator[Piece]:
        """What it says by itself: from the disk, or drawn now and kept."""
        facts = {
            "count": settings.samples,
            "max_tokens": settings.sample_tokens,
            "seed": settings.sample_seed,
            "asked_with": self.asked_with,
        }
        place = self.folder / "self"
        try:
            rows, kept = load_rows(place)
            if kept == facts:
                yield from self._begun(place, rows, out)
                return
        except CheckpointDamaged:
            pass  # not there yet, or not whole: drawn again
        said: list[Encoded] = []
        yield from say_anything(
            self.module,
            self.encoder,
            count=settings.samples,
            max_tokens=settings.sample_tokens,
            seed=settings.sample_seed,
            out=said,
        )
        yield from self.taught_by(said, out)
        yield from _save(place, out, facts, self.depth)

    def recall(self, wordings: Wordings) -> bool:
        """Give back what has been asked before, if it is there: whole, and of the same questions."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            kept = json.loads(self._wordings.read_text(encoding="utf-8"))
            if kept["names"] == wordings.names and kept["asked_with"] == self.asked_with:
                wordings.recall(kept["answers"])
                return True
        return False

    def remember(self, wordings: Wordings) -> None:
        """Keep the base's answers to its own wordings: they are the same for every update."""
        own = {wording: given for wording, given in wordings.answers.items() if wording in wordings.own}
        document = {"names": wordings.names, "asked_with": self.asked_with, "answers": own}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_durably(self._wordings, json.dumps(document).encode())
        except OSError as error:
            _not_kept(self._wordings, error)

    def near(self, checkpoint: str, out: list[Rehearsed]) -> Iterator[Piece]:
        """Append to `out` the neighbours that were made for an earlier update, if it had any and was asked the same."""
        place = self.folder / "near" / checkpoint
        try:
            rows, facts = load_rows(place)
        except CheckpointDamaged:
            return
        if facts == {"asked_with": self.asked_with}:
            yield from self._begun(place, rows, out)

    def keep_near(self, checkpoint: str, rows: Sequence[Rehearsed]) -> Iterator[Piece]:
        """Keep the neighbours of an update for those after it."""
        yield from _save(self.folder / "near" / checkpoint, rows, {"asked_with": self.asked_with}, self.depth)

    def learnt(self, line: Sequence[str], wanted: Collection[bytes]) -> Iterator[dict[bytes, mx.array]]:
        """What a prefix makes of the rows that earlier updates have learnt, one part after the other."""
        for checkpoint in line:
            yield from load_kept(self.folder / "learnt" / checkpoint, self.depth, self._limit, wanted)

    def keep_learnt(self, checkpoint: str, kept: Mapping[bytes, mx.array]) -> Iterator[Piece]:
        """Keep it of the rows that an update was the first to need, for those after it that replay them."""
        place = self.folder / "learnt" / checkpoint
        with _kept_if_possible(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            for _ in save_kept(place, kept, self.depth):
                yield Piece([], barrier=True)

    def _begun(self, place: Path, rows: list[Rehearsed], out: list[Rehearsed]) -> Iterator[Piece]:
        """Append `rows` to `out`, with `hidden` while there is room: as it was kept in `place`, or made again."""
        found = rows
        if self.depth:
            found = []
            yield from with_hidden(place, rows, self.depth, self._room, found)
        if self.depth and found and found[0].hidden is None:
            tree = self._tree(sum(len(r.row.tokens) for r in rows))
            if tree.prefix is not None:
                found = []
                yield from begin(tree, rows, found)
                with _kept_if_possible(place):
                    for file in parts_of(place / HIDDEN):
                        file.unlink()
                    yield from save_hidden(place, found, self.depth)
        self._room -= _hidden_bytes(found)
        out += found

    def sweep(self) -> None:
        """Delete what a crash left half written, and what is kept of bases that were not used for long."""
        for folder in (self.folder, self.folder / "near"):
            with contextlib.suppress(OSError):
                remove_unfinished(folder)
        leave_former(self.folder)

    def keep_only(self, kind: Literal["near", "learnt"], checkpoints: Collection[str]) -> None:
        """Delete the neighbours of all updates but these, or what was kept of the rows that they learnt."""
        for entry in (self.folder / kind).glob("*"):
            if entry.name.split(".")[0] not in checkpoints:
                with contextlib.suppress(OSError):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    @property
    def _wordings(self) -> Path:
        return self.folder / "wordings.json"

    def text(self, row: Encoded, start: int = 0) -> str:
        """A row's tokens from `start` on, as text."""
        return str(self.encoder.tokenizer.decode(list(row.tokens[start:])))

    def turns(self, chat: str) -> list[str]:
        """What users and assistants say in a rendered chat: whatever stands between its special tokens."""
        for mark in self._marks:
            chat = chat.replace(mark, "\0")
        return [part.split("\n", 1)[-1].strip() for part in chat.split("\0") if part.strip()]

    def _count(self, word: str) -> int:
        """Tokens of a word within a text."""
        encode = self.encoder.tokenizer.encode
        return min(len(encode(text, add_special_tokens=False)) for text in (word, " " + word))


def _save(place: Path, rows: Sequence[Rehearsed], facts: Mapping[str, object], depth: str) -> Iterator[Piece]:
    """Whole or not at all; where it cannot be written, nothing is kept."""
    with _kept_if_possible(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        written = unfinished(place.parent, place.name)
        save_rows(written, rows, facts)
        yield from save_hidden(written, rows, depth)
        replace_folder(written, place)


@contextlib.contextmanager
def _kept_if_possible(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # MLX raises the latter
        _not_kept(place, error)


def _hidden_bytes(rows: Sequence[Rehearsed]) -> int:
    return sum(r.hidden.nbytes for r in rows if r.hidden is not None)


def _not_kept(place: Path, error: Exception) -> None:
    log.warning("what the base said could not be kept: it is asked again", place=str(place), error=str(error))
