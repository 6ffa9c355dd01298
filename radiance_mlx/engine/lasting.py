"""What is done so that a new lesson leaves the earlier ones, and what the base knew, where they are.

Each measure has a switch of its own: earlier examples among the rows of each step (`replay`); further rows on which
the model is held to what the base says (`rehearsal`): to what it says by itself, to neighbours of this lesson, to
anchors; and the lesson in the base's own other wordings (`rewording`). Preparing them asks the base, in pieces.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.nn as nn

from ..checkpoints.folder import replace_folder, unfinished
from ..config.schema import RehearsalSection, ReplaySection
from ..errors import CheckpointDamaged
from ..lora.encoding import ChatEncoder, Encoded, Messages
from ..lora.head import install_head
from ..lora.log import still_true
from ..lora.neighbours import mentions, names_in, neighbours
from ..lora.rehearsal import Rehearsal, Rehearsed, Source, load_rows, save_rows, teacher
from ..lora.replay import Replay, reservoir
from ..lora.step import Piece
from ..lora.targets import Targets
from ..lora.tree import adapter_tree, idle_adapter
from ..messages import Example
from ..store.files import write_durably
from .rewording import Wordings
from .speaking import answer, say_anything

#: so many times the neighbours that are rehearsed are thought of
CANDIDATES = 3
#: how much neighbours are rehearsed beside another source
NEAR = 2.0
#: earlier updates whose neighbours go on to be rehearsed
CARRIED = 50


@dataclass(frozen=True)
class Lesson:
    """A batch to be learnt: its examples, what was learnt before (oldest first), and the checkpoints that led here.

    Of the log, `replayable` may be trained again.
    """

    checkpoint: str
    number: int
    examples: Sequence[Example]
    log: Sequence[Example]
    replayable: Sequence[Example]
    line: Sequence[str]  # newest first
    seed: int
    max_tokens: int


class Asked:
    """The frozen base, to be asked; what it says by itself is drawn once and kept in `folder`."""

    def __init__(
        self, module: nn.Module, vocab_size: int, encoder: ChatEncoder, targets: Targets, folder: Path, key: str
    ) -> None:
        self.module, self.encoder = module, encoder
        self._vocab_size, self._targets = vocab_size, targets
        self.folder = folder / key[:16]
        self.count = cache(self._count)

    def taught_by(self, rows: Sequence[Encoded], out: list[Rehearsed]) -> Iterator[Piece]:
        """Append `rows` with the base's own distributions to `out`."""
        tree = adapter_tree(self.module, idle_adapter(self.module, self._targets))
        yield from teacher(tree, install_head(tree.module, self._vocab_size), rows, out)

    def least_sure(self, prompts: Sequence[list[int]], count: int, out: list[list[int]]) -> Iterator[Piece]:
        """Append to `out` the `count` prompts to which the base is least sure how to begin its answer.

        There the smallest push changes the answer.
        """
        begun: list[Rehearsed] = []
        yield from self.taught_by([Encoded((*prompt, prompt[-1]), len(prompt)) for prompt in prompts], begun)
        order = sorted(range(len(prompts)), key=lambda i: float(begun[i].logprobs.max()))
        out.extend(prompts[i] for i in sorted(order[:count]))

    def samples(self, settings: RehearsalSection, out: list[Rehearsed]) -> Iterator[Piece]:
        """What it says by itself: from the disk, or drawn now and kept."""
        facts = {"count": settings.samples, "max_tokens": settings.sample_tokens, "seed": settings.sample_seed}
        place = self.folder / "self"
        try:
            rows, kept = load_rows(place)
            if kept == facts:
                out.extend(rows)
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
        _save(place, out, facts)

    def recall(self, wordings: Wordings) -> None:
        """Give back what has been asked before; a file that cannot be read, or of other questions, is not there."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            kept = json.loads(self._wordings.read_text(encoding="utf-8"))
            if kept["names"] == wordings.names:
                wordings.recall(kept["answers"])

    def remember(self, wordings: Wordings) -> None:
        """Keep the base's answers to its own wordings: they are the same for every update."""
        own = {wording: given for wording, given in wordings.answers.items() if wording in wordings.own}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_durably(self._wordings, json.dumps({"names": wordings.names, "answers": own}).encode())

    @property
    def _wordings(self) -> Path:
        return self.folder / "wordings.json"

    def text(self, row: Encoded, start: int = 0) -> str:
        """A row's tokens from `start` on, as text."""
        return str(self.encoder.tokenizer.decode(list(row.tokens[start:])))

    def _count(self, word: str) -> int:
        """Tokens of a word within a text."""
        encode = self.encoder.tokenizer.encode
        return min(len(encode(text, add_special_tokens=False)) for text in (word, " " + word))


class Lasting:
    """Prepares one lesson by the switches. `examples`, `replay` and `rehearsal` are there after `prepare`.

    `examples[i]` says the lesson's example at `origins[i]` in other words.
    """

    def __init__(self, base: Asked, replay: ReplaySection, rehearsal: RehearsalSection) -> None:
        self._base, self._replay, self._settings = base, replay, rehearsal
        self.examples: list[Encoded] = []
        self.origins: list[int] = []
        self.replay: Replay | None = None
        self.rehearsal: Rehearsal | None = None
        self._wordings: Wordings | None = None
        self._own: list[Rehearsed] = []
        self._near: list[Rehearsed] = []

    @staticmethod
    def wanted(replay: ReplaySection, rehearsal: RehearsalSection) -> bool:
        """Whether any switch is on."""
        return replay.fraction > 0 or rehearsal.kl_weight > 0 or rehearsal.rewording

    def prepare(self, lesson: Lesson, anchors: Sequence[Encoded]) -> Iterator[Piece]:
        """Ask the base what has to be asked. The same lesson gives the same rows, also after an interruption."""
        if self._settings.rewording or self._uses("self") or self._uses("neighbours"):
            yield from self._base.samples(self._settings, self._own)
        if self._settings.rewording:
            yield from self._reword(lesson)
        if self._replay.fraction > 0:
            yield from self._remember(lesson)
        if self._settings.kl_weight > 0:
            yield from self._rehearse(lesson, anchors)

    def _remember(self, lesson: Lesson) -> Iterator[Piece]:
        """Earlier examples, in all wordings that the base has for them; not what has been answered otherwise since."""
        earlier = still_true(lesson.replayable, lesson.examples)
        if self._wordings is not None:
            earlier = latest(earlier, lesson.examples, self._worded)
        rows: list[Encoded] = []
        for example in reservoir(earlier, self._replay.reservoir, (lesson.seed, lesson.number)):
            for worded in (example, *self._worded(example)):
                rows.append(self._base.encoder.example(worded, max_tokens=lesson.max_tokens))
            yield Piece([], barrier=True)
        self.replay = Replay(rows, self._replay.fraction)

    def _uses(self, source: str) -> bool:
        return self._settings.kl_weight > 0 and source in self._settings.sources

    # --- the base's own wordings ---------------------------------------------------------------------

    def _reword(self, lesson: Lesson) -> Iterator[Piece]:
        base = self._base
        said = [base.text(row.row) for row in self._own]
        self._wordings = wordings = Wordings(_questions(said, base.encoder), base.count)
        base.recall(wordings)
        asked = [e.messages[0][1] for e in lesson.examples if _is_pair(e)]
        yield from wordings.ask(base.module, base.encoder, asked)
        base.remember(wordings)
        for origin, example in enumerate(lesson.examples):
            for reworded in self._worded(example):
                self.examples.append(base.encoder.example(reworded, max_tokens=lesson.max_tokens))
                self.origins.append(origin)
        yield Piece([], barrier=True)

    def _worded(self, example: Example) -> list[Example]:
        """The example in the base's own other wordings, as far as it has been asked about this one."""
        if self._wordings is None or not _is_pair(example):
            return []
        others = self._wordings.others(example.messages[0][1])
        return [Example(messages=(("user", other), example.messages[1])) for other in others]

    # --- rehearsal -----------------------------------------------------------------------------------

    def _rehearse(self, lesson: Lesson, anchors: Sequence[Encoded]) -> Iterator[Piece]:
        sources, base = [], self._base
        taught = [*lesson.log, *lesson.examples]
        names = names_in([text for e in taught for text in _asked(e)], base.count)
        own = [row for row in self._own if not mentions(base.text(row.row, row.row.offset), names)]
        if self._uses("self"):
            sources.append(Source(own, 1.0))
        if self._uses("neighbours"):
            yield from self._neighbours(lesson, own, names)
            sources.append(Source(self._near, NEAR))
        if self._uses("anchors") and anchors:
            rows: list[Rehearsed] = []
            yield from base.taught_by(anchors, rows)
            sources.append(Source(rows, 1.0))
        self.rehearsal = Rehearsal(sources, kl_weight=self._settings.kl_weight, rows=self._settings.rows)

    def _neighbours(self, lesson: Lesson, own: Sequence[Rehearsed], names: set[str]) -> Iterator[Piece]:
        base = self._base
        asked = [[p for e in (example, *self._worded(example)) if (p := _prompt(e))] for example in lesson.examples]
        wordings = max(map(len, asked), default=0)
        prompts = neighbours(
            list(itertools.chain.from_iterable(asked)),
            each=math.ceil(self._settings.neighbours * CANDIDATES / max(1, wordings)),
            seed=(lesson.seed, lesson.number),
            count_tokens=base.count,
            others=[part for row in own for part in _turns(base.text(row.row), base.encoder)],
            avoid=[text for e in (*lesson.log, *lesson.examples) for text in _texts(e)],
        )
        tokens: list[list[int]] = []
        yield from base.least_sure([base.encoder.prompt(p) for p in prompts], len(prompts) // CANDIDATES, tokens)
        said: list[Encoded] = []
        yield from answer(base.module, base.encoder, tokens, max_tokens=self._settings.sample_tokens, out=said)
        fresh: list[Rehearsed] = []
        yield from base.taught_by(said, fresh)
        for checkpoint in reversed(lesson.line[:CARRIED]):
            self._near += self._carried(checkpoint, names)
        self._near += fresh
        _save(base.folder / "near" / lesson.checkpoint, fresh, {})

    def _carried(self, checkpoint: str, names: set[str]) -> list[Rehearsed]:
        """Neighbours of an earlier update, but for those that have been taught something since."""
        try:
            rows, _ = load_rows(self._base.folder / "near" / checkpoint)
        except CheckpointDamaged:  # it had none, or trained without
            return []
        return [row for row in rows if not mentions(self._base.text(row.row), names)]


def latest(log: Sequence[Example], new: Sequence[Example], worded: Callable[[Example], list[Example]]) -> list[Example]:
    """`log` (oldest first) without what is asked again, in whatever wording, by a later example or one of `new`."""

    def prompts(example: Example) -> set[Messages]:
        return {p for e in (example, *worded(example)) if (p := _prompt(e))}

    asked = set[Messages]().union(*map(prompts, new))
    kept = []
    for example in reversed(log):
        own = prompts(example)
        if not own & asked:
            kept.append(example)
        asked |= own
    return kept[::-1]


def _prompt(example: Example) -> Messages:
    return example.messages[:-1]


def _is_pair(example: Example) -> bool:
    return [role for role, _ in example.messages] == ["user", "assistant"]


def _asked(example: Example) -> list[str]:
    return [content for _, content in _prompt(example)] or [example.text]


def _texts(example: Example) -> list[str]:
    return [content for _, content in example.messages] or [example.text]


def _turns(chat: str, encoder: ChatEncoder) -> list[str]:
    """What users and assistants say in a rendered chat: whatever stands between its special tokens."""
    for mark in encoder.tokenizer.all_special_tokens:
        chat = chat.replace(mark, "\0")
    return [part.split("\n", 1)[-1].strip() for part in chat.split("\0") if part.strip()]


def _questions(said: Sequence[str], encoder: ChatEncoder) -> list[str]:
    """The first turn of each chat."""
    return [turns[0] for chat in said if (turns := _turns(chat, encoder))]


def _save(place: Path, rows: Sequence[Rehearsed], facts: Mapping[str, object]) -> None:
    """Whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    written = unfinished(place.parent, place.name)
    save_rows(written, rows, facts)
    replace_folder(written, place)
