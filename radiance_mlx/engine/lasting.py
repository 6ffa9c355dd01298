"""What is done so that a new lesson leaves the earlier ones, and what the base knew, where they are.

Each measure has a switch of its own: earlier examples among the rows of each step (`replay`); further rows on which
the model is held to what the base says (`rehearsal`): to what it says by itself, to neighbours of this lesson, to
anchors; and the lesson in the base's own other wordings (`rewording`). Preparing them asks the base, in pieces.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..config import Config
from ..config.schema import RehearsalSection, ReplaySection
from ..lora.encoding import Encoded, Messages
from ..lora.log import LOOKED_AT, still_true
from ..lora.neighbours import Names, names_in, neighbours
from ..lora.rehearsal import Rehearsal, Rehearsed, Source
from ..lora.replay import Replay, reservoir
from ..lora.step import Piece
from ..messages import Example
from .asked import Asked
from .foundation import Foundation
from .rewording import Wordings
from .speaking import answer

#: so many times the neighbours that are rehearsed are thought of
CANDIDATES = 2
#: earlier updates whose neighbours go on to be rehearsed
CARRIED = 50


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


class Lasting:
    """Prepares one lesson by the switches. What it makes is there after `prepare`.

    `kept` are the places of the lesson's examples that are learnt, and `examples[i]` says the one at `kept[origins[i]]`
    in other words; `notes` are for the job.
    """

    def __init__(self, base: Asked, replay: ReplaySection, rehearsal: RehearsalSection) -> None:
        self.base, self._replay, self._settings = base, replay, rehearsal
        self.examples: list[Encoded] = []
        self.origins: list[int] = []
        self.kept: list[int] = []
        self.replay: Replay | None = None
        self.rehearsal: Rehearsal | None = None
        self.notes: list[str] = []
        self._wordings: Wordings | None = None
        self._own: list[Rehearsed] = []
        self._near: list[Rehearsed] = []

    @classmethod
    def of(cls, foundation: Foundation, config: Config) -> "Lasting | None":
        """By this configuration, with what is kept in the home; None if no switch is on."""
        replay, rehearsal = config.replay, config.rehearsal
        if not (replay.fraction > 0 or rehearsal.kl_weight > 0 or rehearsal.rewording):
            return None
        base, place = foundation.base, foundation.home / "state" / "rehearsal"
        parts = (base.module, base.vocab_size, foundation.encoder, foundation.targets)
        asked = Asked(*parts, place, base.fingerprint, hidden_bytes=config.training.prefix_bytes)
        return cls(asked, replay, rehearsal)

    @property
    def asks(self) -> bool:
        """Whether the base is asked what does not depend on a lesson."""
        return self._settings.rewording or self._uses("self") or self._uses("neighbours")

    def ask_ahead(self, longest: int) -> Iterator[Piece]:
        """Ask the base what does not depend on a lesson, and keep it; prompts of more than `longest` tokens are not."""
        self.base.sweep()
        if self.asks:
            yield from self.base.samples(self._settings, self._own)
        if self._settings.rewording:
            yield from self._ask_wordings(longest)

    def prepare(self, lesson: Lesson, anchors: Sequence[Encoded]) -> Iterator[Piece]:
        """Ask the base what has to be asked. The same lesson gives the same rows, also after an interruption."""
        yield from self.ask_ahead(lesson.max_tokens)
        self.base.end_ahead()  # it can be asked here
        self.kept = list(range(len(lesson.examples)))
        if self._settings.rewording:
            yield from self._reword(lesson)
        if self._replay.fraction > 0:
            yield from self._remember(lesson)
        if self._settings.kl_weight > 0:
            yield from self._rehearse(lesson, anchors)

    def rows(self, max_tokens: int) -> list[Encoded]:
        """All rows beside the lesson's own; of what is rehearsed, those that are not too long."""
        sources = self.rehearsal.sources if self.rehearsal else ()
        rehearsed = [r.row for source in sources for r in source.rows if len(r.row.tokens) <= max_tokens]
        return [*self.trained, *rehearsed]

    @property
    def trained(self) -> list[Encoded]:
        """The rows that are trained as the lesson's own are: other wordings, and what is replayed."""
        return [*self.examples, *(self.replay.examples if self.replay else ())]

    def _remember(self, lesson: Lesson) -> Iterator[Piece]:
        """Earlier examples, in all wordings that the base has for them; not what has been answered otherwise since.

        Since then means by any update, whether it may be replayed or not.
        """
        places: list[int] = []
        yield from self._still_true(lesson.log, lesson.examples, places)
        replayable = set(lesson.replayable)
        earlier = [lesson.log[place] for place in places if place in replayable]
        rows: list[Encoded] = []
        for example in reservoir(earlier, self._replay.reservoir, (lesson.seed, lesson.number)):
            rows += [self._encoded(worded, lesson) for worded in (example, *self._worded(example))]
            yield Piece([], barrier=True)
        self.replay = Replay(rows, self._replay.fraction, self._replay.refocus)

    def _still_true(self, log: Sequence[Example], new: Sequence[Example], out: list[int]) -> Iterator[Piece]:
        for _ in still_true(log, new, out, self._worded):
            yield Piece([], barrier=True)

    def _encoded(self, example: Example, lesson: Lesson) -> Encoded:
        return self.base.encoder.example(example, mask_prompt=lesson.mask_prompt, max_tokens=lesson.max_tokens)

    def _uses(self, source: str) -> bool:
        return self._settings.kl_weight > 0 and source in self._settings.sources

    # --- the base's own wordings ---------------------------------------------------------------------

    def _ask_wordings(self, longest: int) -> Iterator[Piece]:
        """Find the base's own wordings in what it says by itself, and have its answers to them."""
        base, said = self.base, list[str]()
        for row in self._own:
            said += base.turns(base.text(row.row))[:1]
            yield Piece([], barrier=True)
        self._wordings = wordings = Wordings(said, base.count)
        there, known = base.recall(wordings), len(wordings.answers)
        yield from wordings.ask(base.module, base.encoder, [], longest=longest)
        if not there or len(wordings.answers) > known:
            base.remember(wordings)

    def _reword(self, lesson: Lesson) -> Iterator[Piece]:
        """Say the lesson's examples in the base's other wordings; what a later example asks, that one answers.

        A wording that a later example asks, in whatever words, or that any example has been posted in, is left out,
        so that no prompt gets a second answer here. What has been posted stays as it is; but in a reconsolidation,
        where the examples are the log, one that a later example asks again in another wording is not learnt at all.
        """
        assert self._wordings is not None
        base, asked = self.base, [e.messages[0][1] for e in lesson.examples if _is_pair(e)]
        yield from self._wordings.ask(base.module, base.encoder, asked, longest=lesson.max_tokens)
        if lesson.reconsolidated:
            self.kept.clear()
            yield from self._still_true(lesson.examples, (), self.kept)
        examples = [lesson.examples[place] for place in self.kept]
        taken = {example.prompt for example in examples if example.plain}
        found: list[tuple[int, Example]] = []
        for origin, example in reversed(list(enumerate(examples))):
            worded = self._worded(example)
            found += [(origin, e) for e in reversed(worded) if e.prompt not in taken]
            taken.update(e.prompt for e in worded)
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
        sources, base, names = dict[str, Source](), self.base, Names()
        yield from names_in([text for e in (*lesson.log, *lesson.examples) for text in _asked(e)], base.count, names)
        own: list[Rehearsed] = []
        for row in self._own:
            if not names.occur_in(base.text(row.row, row.row.offset)):
                own.append(row)
            yield Piece([], barrier=True)
        if self._uses("self"):
            sources["self"] = Source(own)
        if self._uses("neighbours"):
            yield from self._neighbours(lesson, own, names)
            sources["neighbours"] = Source(self._near)
        if self._uses("anchors"):
            rows: list[Rehearsed] = []
            yield from base.taught_by(anchors, rows)
            sources["anchors"] = Source(rows)
        self.notes += [f"nothing to rehearse of rehearsal.sources: {n}" for n, s in sources.items() if not s.rows]
        settings, rows_of = self._settings, list(sources.values())
        self.rehearsal = Rehearsal(
            rows_of, kl_weight=settings.kl_weight, rows=settings.rows, row_targets=settings.row_targets
        )

    def _neighbours(self, lesson: Lesson, own: Sequence[Rehearsed], names: Names) -> Iterator[Piece]:
        """Those of earlier updates, and those of this one, which are kept; forget updates that did not lead here.

        A reconsolidation forgets none: it may be put aside, and updates go on without it.
        """
        base, line = self.base, lesson.line[:CARRIED]
        fresh: list[Rehearsed] = []
        yield from self._fresh(lesson, own, fresh)
        if not lesson.reconsolidated:
            base.keep_only("near", {*line, lesson.checkpoint})
        for checkpoint in reversed(line):
            carried: list[Rehearsed] = []
            yield from base.near(checkpoint, carried)
            # not of what has been taught something since
            self._near += [row for row in carried if not names.occur_in(base.text(row.row))]
            yield Piece([], barrier=True)
        self._near += fresh
        yield from base.keep_near(lesson.checkpoint, fresh)

    def _fresh(self, lesson: Lesson, own: Sequence[Rehearsed], out: list[Rehearsed]) -> Iterator[Piece]:
        """Append to `out` the lesson's neighbours: prompts that leave room for an answer, and what the base says."""
        base, answers = self.base, self._settings.sample_tokens
        room = lesson.max_tokens - answers
        asked: list[Messages] = []
        wordings = 0
        for number, example in enumerate(lesson.examples, 1):
            # one with tools is no prompt without them: it has no neighbours
            prompts = [p for e in (example, *self._worded(example)) if (p := e.prompt) and e.plain]
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


def _is_pair(example: Example) -> bool:
    return example.plain and [role for role, _ in example.messages] == ["user", "assistant"]


def _asked(example: Example) -> list[str]:
    return [content for _, content in example.prompt] or [example.text]


def _texts(example: Example) -> list[str]:
    return [content for _, content in example.messages] or [example.text]
