"""What is done so that a new lesson leaves the earlier ones, and what the base knew, where they are.

Each measure has a switch of its own: earlier examples among the rows of each step (`replay`); further rows on which
the model is held to what the base says (`rehearsal`): to what it says by itself, to neighbours of this lesson, to
anchors; and the lesson in the base's own other wordings (`rewording`). Preparing them asks the base, in pieces.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.nn as nn
import structlog

from ..checkpoints.folder import remove_unfinished, replace_folder, unfinished
from ..config.schema import RehearsalSection, ReplaySection
from ..errors import CheckpointDamaged
from ..lora.encoding import ChatEncoder, Encoded, Messages
from ..lora.head import install_head
from ..lora.neighbours import Names, names_in, neighbours
from ..lora.rehearsal import Rehearsal, Rehearsed, Source, load_rows, save_rows, teacher
from ..lora.replay import Replay, reservoir
from ..lora.step import Piece
from ..lora.targets import Targets
from ..lora.tree import adapter_tree, idle_adapter
from ..messages import Example
from ..store.files import write_durably
from .rewording import Wordings
from .speaking import answer, say_anything

log = structlog.get_logger(__name__)

#: so many times the neighbours that are rehearsed are thought of
CANDIDATES = 3
#: how much neighbours are rehearsed beside another source
NEAR = 2.0
#: earlier updates whose neighbours go on to be rehearsed
CARRIED = 50
#: so many examples, prompts or rows are looked at before others get a turn
LOOKED_AT = 32


@dataclass(frozen=True)
class Lesson:
    """A batch to be learnt: its examples, what was learnt before (oldest first), and the checkpoints that led here.

    `replayable` are the places in the log of what may be trained again. With `reconsolidated` the examples are the log.
    """

    checkpoint: str
    number: int
    examples: Sequence[Example]
    log: Sequence[Example]
    replayable: Sequence[int]
    line: Sequence[str]  # newest first
    seed: int
    max_tokens: int
    mask_prompt: bool = True
    reconsolidated: bool = False


class Asked:
    """The frozen base, to be asked; what it says by itself is drawn once and kept in `folder`."""

    def __init__(
        self, module: nn.Module, vocab_size: int, encoder: ChatEncoder, targets: Targets, folder: Path, key: str
    ) -> None:
        self.module, self.encoder = module, encoder
        self._vocab_size, self._targets = vocab_size, targets
        self.folder = folder / key[:16]
        self.count = cache(self._count)
        self.asked_with = json.dumps(encoder.template_args, sort_keys=True, default=str)
        self._marks = tuple(encoder.tokenizer.all_special_tokens)

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
            if kept["names"] == wordings.names and kept["asked_with"] == self.asked_with:
                wordings.recall(kept["answers"])

    def remember(self, wordings: Wordings) -> None:
        """Keep the base's answers to its own wordings: they are the same for every update."""
        own = {wording: given for wording, given in wordings.answers.items() if wording in wordings.own}
        document = {"names": wordings.names, "asked_with": self.asked_with, "answers": own}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_durably(self._wordings, json.dumps(document).encode())
        except OSError as error:
            _not_kept(self._wordings, error)

    def near(self, checkpoint: str) -> list[Rehearsed]:
        """The neighbours that were made for an earlier update; none if it had none, or was asked otherwise."""
        try:
            rows, facts = load_rows(self.folder / "near" / checkpoint)
        except CheckpointDamaged:
            return []
        return rows if facts == {"asked_with": self.asked_with} else []

    def keep_near(self, checkpoint: str, rows: Sequence[Rehearsed]) -> None:
        """Keep the neighbours of an update for those after it."""
        _save(self.folder / "near" / checkpoint, rows, {"asked_with": self.asked_with})

    def sweep(self) -> None:
        """Delete what a crash left half written."""
        for folder in (self.folder, self.folder / "near"):
            with contextlib.suppress(OSError):
                remove_unfinished(folder)

    def keep_only(self, checkpoints: Collection[str]) -> None:
        """Delete the neighbours of all updates but these."""
        near = self.folder / "near"
        for folder in near.iterdir() if near.is_dir() else ():
            if folder.name not in checkpoints:
                shutil.rmtree(folder, ignore_errors=True)

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


class Lasting:
    """Prepares one lesson by the switches. What it makes is there after `prepare`.

    `kept` are the places of the lesson's examples that are learnt, and `examples[i]` says the one at `kept[origins[i]]`
    in other words; `notes` are for the job.
    """

    def __init__(self, base: Asked, replay: ReplaySection, rehearsal: RehearsalSection) -> None:
        self._base, self._replay, self._settings = base, replay, rehearsal
        self.examples: list[Encoded] = []
        self.origins: list[int] = []
        self.kept: list[int] = []
        self.replay: Replay | None = None
        self.rehearsal: Rehearsal | None = None
        self.notes: list[str] = []
        self._wordings: Wordings | None = None
        self._own: list[Rehearsed] = []
        self._near: list[Rehearsed] = []

    @staticmethod
    def wanted(replay: ReplaySection, rehearsal: RehearsalSection) -> bool:
        """Whether any switch is on."""
        return replay.fraction > 0 or rehearsal.kl_weight > 0 or rehearsal.rewording

    def prepare(self, lesson: Lesson, anchors: Sequence[Encoded]) -> Iterator[Piece]:
        """Ask the base what has to be asked. The same lesson gives the same rows, also after an interruption."""
        self._base.sweep()
        self.kept = list(range(len(lesson.examples)))
        if self._settings.rewording or self._uses("self") or self._uses("neighbours"):
            yield from self._base.samples(self._settings, self._own)
        if self._settings.rewording:
            yield from self._reword(lesson)
        if self._replay.fraction > 0:
            yield from self._remember(lesson)
        if self._settings.kl_weight > 0:
            yield from self._rehearse(lesson, anchors)

    def rows(self, max_tokens: int) -> list[Encoded]:
        """All rows that are trained beside the lesson's own; of what is rehearsed, those that are not too long."""
        replayed = self.replay.examples if self.replay else ()
        sources = self.rehearsal.sources if self.rehearsal else ()
        rehearsed = [r.row for source in sources for r in source.rows if len(r.row.tokens) <= max_tokens]
        return [*self.examples, *replayed, *rehearsed]

    def _remember(self, lesson: Lesson) -> Iterator[Piece]:
        """Earlier examples, in all wordings that the base has for them; not what has been answered otherwise since.

        Since then means by any update, whether it may be replayed or not.
        """
        places: list[int] = []
        yield from latest(lesson.log, lesson.examples, self._worded, places)
        replayable = set(lesson.replayable)
        earlier = [lesson.log[place] for place in places if place in replayable]
        rows: list[Encoded] = []
        for example in reservoir(earlier, self._replay.reservoir, (lesson.seed, lesson.number)):
            rows += [self._encoded(worded, lesson) for worded in (example, *self._worded(example))]
            yield Piece([], barrier=True)
        self.replay = Replay(rows, self._replay.fraction)

    def _encoded(self, example: Example, lesson: Lesson) -> Encoded:
        return self._base.encoder.example(example, mask_prompt=lesson.mask_prompt, max_tokens=lesson.max_tokens)

    def _uses(self, source: str) -> bool:
        return self._settings.kl_weight > 0 and source in self._settings.sources

    # --- the base's own wordings ---------------------------------------------------------------------

    def _reword(self, lesson: Lesson) -> Iterator[Piece]:
        """Say the lesson's examples in the base's other wordings; what a later example asks, that one answers.

        A wording that a later example asks, in whatever words, or that any example has been posted in, is left out,
        so that no prompt gets a second answer here. What has been posted stays as it is; but in a reconsolidation,
        where the examples are the log, one that a later example asks again in another wording is not learnt at all.
        """
        base = self._base
        said: list[str] = []
        for row in self._own:
            said += base.turns(base.text(row.row))[:1]
            yield Piece([], barrier=True)
        self._wordings = wordings = Wordings(said, base.count)
        base.recall(wordings)
        asked = [e.messages[0][1] for e in lesson.examples if _is_pair(e)]
        yield from wordings.ask(base.module, base.encoder, asked, longest=lesson.max_tokens)
        base.remember(wordings)
        if lesson.reconsolidated:
            self.kept.clear()
            yield from latest(lesson.examples, (), self._worded, self.kept)
        examples = [lesson.examples[place] for place in self.kept]
        taken = {_prompt(example) for example in examples}
        found: list[tuple[int, Example]] = []
        for origin, example in reversed(list(enumerate(examples))):
            worded = self._worded(example)
            found += [(origin, e) for e in reversed(worded) if _prompt(e) not in taken]
            taken.update(map(_prompt, worded))
            yield Piece([], barrier=True)
        for origin, example in reversed(found):
            self.examples.append(self._encoded(example, lesson))
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
        sources, base, names = dict[str, Source](), self._base, Names()
        yield from names_in([text for e in (*lesson.log, *lesson.examples) for text in _asked(e)], base.count, names)
        own: list[Rehearsed] = []
        for row in self._own:
            if not names.occur_in(base.text(row.row, row.row.offset)):
                own.append(row)
            yield Piece([], barrier=True)
        if self._uses("self"):
            sources["self"] = Source(own, 1.0)
        if self._uses("neighbours"):
            yield from self._neighbours(lesson, own, names)
            sources["neighbours"] = Source(self._near, NEAR)
        if self._uses("anchors"):
            rows: list[Rehearsed] = []
            yield from base.taught_by(anchors, rows)
            sources["anchors"] = Source(rows, 1.0)
        self.notes += [f"nothing to rehearse of rehearsal.sources: {n}" for n, s in sources.items() if not s.rows]
        self.rehearsal = Rehearsal(list(sources.values()), kl_weight=self._settings.kl_weight, rows=self._settings.rows)

    def _neighbours(self, lesson: Lesson, own: Sequence[Rehearsed], names: Names) -> Iterator[Piece]:
        """Those of earlier updates, and those of this one, which are kept; forget updates that did not lead here.

        A reconsolidation forgets none: it may be put aside, and updates go on without it.
        """
        base, line = self._base, lesson.line[:CARRIED]
        fresh: list[Rehearsed] = []
        yield from self._fresh(lesson, own, fresh)
        if not lesson.reconsolidated:
            base.keep_only({*line, lesson.checkpoint})
        for checkpoint in reversed(line):
            # not of what has been taught something since
            self._near += [row for row in base.near(checkpoint) if not names.occur_in(base.text(row.row))]
            yield Piece([], barrier=True)
        self._near += fresh
        base.keep_near(lesson.checkpoint, fresh)

    def _fresh(self, lesson: Lesson, own: Sequence[Rehearsed], out: list[Rehearsed]) -> Iterator[Piece]:
        """Append to `out` the lesson's neighbours: prompts that leave room for an answer, and what the base says."""
        base, answers = self._base, self._settings.sample_tokens
        room = lesson.max_tokens - answers
        asked: list[Messages] = []
        wordings = 0
        for number, example in enumerate(lesson.examples, 1):
            prompts = [p for e in (example, *self._worded(example)) if (p := _prompt(e))]
            prompts = [p for p in prompts if base.encoder.at_least(p) <= room]
            asked += prompts
            wordings = max(wordings, len(prompts))
            if number % LOOKED_AT == 0:
                yield Piece([], barrier=True)
        others: list[str] = []
        for row in own:
            others += base.turns(base.text(row.row))
            yield Piece([], barrier=True)
        near: list[Messages] = []
        yield from neighbours(
            asked,
            near,
            each=math.ceil(self._settings.neighbours * CANDIDATES / max(1, wordings)),
            seed=(lesson.seed, lesson.number),
            count_tokens=base.count,
            others=others,
            avoid=[text for e in (*lesson.log, *lesson.examples) for text in _texts(e)],
        )
        fitting: list[list[int]] = []
        for number, messages in enumerate(near, 1):
            prompt = base.encoder.prompt(messages)
            if len(prompt) <= room:
                fitting.append(prompt)
            if number % LOOKED_AT == 0:
                yield Piece([], barrier=True)
        tokens: list[list[int]] = []
        yield from base.least_sure(fitting, max(1, len(fitting) // CANDIDATES), tokens)
        said: list[Encoded] = []
        # a short prompt's row ends where a sample's would: a micro-batch is padded to its longest row
        short = [prompt for prompt in tokens if len(prompt) <= answers - answers // 4]
        long = [prompt for prompt in tokens if len(prompt) > answers - answers // 4]
        yield from answer(base.module, base.encoder, short, max_tokens=answers, out=said)
        yield from answer(base.module, base.encoder, long, max_tokens=lesson.max_tokens, at_most=answers, out=said)
        yield from base.taught_by(said, out)


def latest(
    log: Sequence[Example], new: Sequence[Example], worded: Callable[[Example], list[Example]], out: list[int]
) -> Iterator[Piece]:
    """Append to `out` the places in `log` (oldest first) of what has not been answered otherwise since.

    That is what no later example, nor one of `new`, asks again in whatever wording. Plain texts all stay.
    """

    def prompts(example: Example) -> set[Messages]:
        return {p for e in (example, *worded(example)) if (p := _prompt(e))}

    asked = set[Messages]()
    for number, example in enumerate(new, 1):
        asked |= prompts(example)
        if number % LOOKED_AT == 0:
            yield Piece([], barrier=True)
    kept = []
    for place in reversed(range(len(log))):
        own = prompts(log[place])
        if not own & asked:
            kept.append(place)
        asked |= own
        if place % LOOKED_AT == 0:
            yield Piece([], barrier=True)
    out.extend(reversed(kept))


def _prompt(example: Example) -> Messages:
    return example.messages[:-1]


def _is_pair(example: Example) -> bool:
    return [role for role, _ in example.messages] == ["user", "assistant"]


def _asked(example: Example) -> list[str]:
    return [content for _, content in _prompt(example)] or [example.text]


def _texts(example: Example) -> list[str]:
    return [content for _, content in example.messages] or [example.text]


def _save(place: Path, rows: Sequence[Rehearsed], facts: Mapping[str, object]) -> None:
    """Whole or not at all; where it cannot be written, nothing is kept."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        written = unfinished(place.parent, place.name)
        save_rows(written, rows, facts)
        replace_folder(written, place)
    except (OSError, RuntimeError) as error:  # MLX raises the latter
        _not_kept(place, error)


def _not_kept(place: Path, error: Exception) -> None:
    log.warning("what the base said could not be kept: it is asked again", place=str(place), error=str(error))
