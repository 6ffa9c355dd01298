"""The asyncio side of evaluation: where the anchors come from, and what is to be measured around an update.

Anchors are read and encoded on a thread, once, and again when local files change; a hub that cannot be reached
holds nothing up but the update that asks for it. What is measured happens on the engine's thread.
"""

import asyncio
import hashlib
import json
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import structlog

from .checkpoints import folder as folders
from .config import Config
from .config.bases import resolve
from .engine.conditions import conditions
from .engine.thread import EngineThread
from .errors import AnchorsUnavailable, CheckpointDamaged, Conflict, InvalidRequest, NotFound
from .evaluation.anchors import AnchorSet, AnchorSettings, encode, load_rows, own_anchors, signature
from .evaluation.plan import EarlierUpdate, Plan, Subject, spread
from .evaluation.policy import FINETUNE_LOSS, Rule
from .lora.encoding import Encoded
from .messages import BASE, EngineFacts, Example
from .store import CheckpointRecord, write_durably

log = structlog.get_logger(__name__)
ADAPTER_FILE, CONFIG_FILE = "adapters.safetensors", "adapter_config.json"
NOTHING_REHEARSED = (
    "rehearsal.sources has anchors: put files named *.jsonl with texts that do not measure into "
    "data/anchors/rehearsal/, or take anchors out of it."
)
ExamplesOf = Callable[[Sequence[str]], Awaitable[Sequence[Example]]]


class Evaluator:
    """One service's evaluation, by its configuration."""

    def __init__(self, config: Config, home: Path, engine: EngineThread, facts: EngineFacts) -> None:
        self._settings, self._home, self._engine = config.evaluation, home, engine
        self._rehearsal = config.rehearsal
        self._facts, self._base_hash = facts, facts.base_hash
        self.anchors = anchor_settings(config, home)
        self._read: tuple[object, AnchorSet] | None = None
        self._reading = asyncio.Lock()
        self.trouble: str | None = None

    @property
    def enabled(self) -> bool:
        """Whether anchors are to be measured at all."""
        return self.anchors.provider != "none"

    @property
    def warnings(self) -> list[str]:
        """What keeps evaluation from doing what the configuration says."""
        warnings = [self.trouble] if self.trouble else []
        if not self.enabled and self._settings.rollback_mode != "off" and self.rule.metric != FINETUNE_LOSS:
            warnings.append("evaluation.rollback_mode has no effect: no anchors are measured (anchor_provider)")
        return warnings

    @property
    def rule(self) -> Rule:
        """What a checkpoint is judged by."""
        settings = self._settings
        return Rule(settings.rollback_mode, settings.metric, settings.catastrophic_delta, settings.confidence)

    async def plan(self, line: Sequence[CheckpointRecord], examples_of: ExamplesOf) -> Plan | None:
        """For an update that goes on from `line` (newest first); None when anchors are off.

        `examples_of` gives the examples of jobs, in the order in which they were accepted.

        Raises `AnchorsUnavailable` if they must be had and cannot be, and if there are none to rehearse that should be.
        """
        rehearsed = await self._rehearsed()
        if not self.enabled:
            judged = self.rule.metric == FINETUNE_LOSS
            return Plan(self.rule, rehearsed=rehearsed) if rehearsed or judged else None
        anchors, unavailable = None, ""
        try:
            anchors = await self.anchor_set(self.anchors)
            self.trouble = None
        except AnchorsUnavailable as error:
            if self._settings.require_anchors:
                raise
            unavailable = error.message
            self.trouble = f"anchors are not measured: {error.message}"
            log.warning("no anchors", error=error.message)
        rehearsed, notes = _apart(rehearsed, anchors)
        return Plan(
            rule=self.rule,
            anchors=anchors,
            unavailable=unavailable,
            earlier=await self._earlier(line, examples_of) if anchors else (),
            sample=self._settings.update_sample,
            scale_first=self._settings.scale_first,
            rehearsed=rehearsed,
            notes=notes,
        )

    async def _rehearsed(self) -> tuple[Encoded, ...]:
        """The anchors that are learnt from: they have a folder of their own.

        Raises `AnchorsUnavailable` whatever `require_anchors` says: without what it was to be held to, an update
        would forget, and figures would only tell afterwards.
        """
        if self._rehearsal.kl_weight == 0 or "anchors" not in self._rehearsal.sources:
            return ()
        folder = self._home / "data" / "anchors" / "rehearsal"
        settings = replace(self.anchors, provider="local", folder=folder)
        try:
            rows = await asyncio.to_thread(load_rows, settings)
            found = await self._engine.encode(lambda encoder: encode(rows, encoder, settings, self._base_hash))
        except AnchorsUnavailable as error:
            raise AnchorsUnavailable(error.message, NOTHING_REHEARSED) from error
        return found.documents

    async def anchor_set(self, settings: AnchorSettings) -> AnchorSet:
        """The encoded anchors. Raises `AnchorsUnavailable`."""
        if settings.provider == "none":
            raise AnchorsUnavailable("No anchors are configured.", "Set evaluation.anchor_provider to hf or local.")
        async with self._reading:
            key = (settings, await asyncio.to_thread(signature, settings))
            if self._read is not None and self._read[0] == key:
                return self._read[1]
            rows = await asyncio.to_thread(load_rows, settings)
            found = await self._engine.encode(lambda encoder: encode(rows, encoder, settings, self._base_hash))
            self._read = key, found
            log.info("anchors", source=found.source, documents=len(found.documents), skipped=found.skipped)
            return found

    async def _earlier(self, line: Sequence[CheckpointRecord], examples_of: ExamplesOf) -> tuple[EarlierUpdate, ...]:
        """The updates that led here and were measured when they were learnt, newest first."""
        updates = []
        learnt = [record for record in line if not record.reconsolidated]
        for record in learnt[: self._settings.update_window]:
            measured = record.metrics.get("own_sample")
            if measured is None:
                continue
            never = set(record.metrics.get("never_trained") or ())
            rows = [e for place, e in enumerate(await examples_of(record.jobs)) if place not in never]
            examples = tuple(rows[i] for i in spread(len(rows), measured["sample"]))
            updates.append(EarlierUpdate(record.checkpoint, examples, measured["loss_before"], measured["loss_after"]))
        return tuple(updates)

    async def evaluate(
        self,
        subjects: Sequence[Subject],
        settings: AnchorSettings,
        report: Callable[[int, int], None] = lambda done, of: None,
    ) -> dict[str, Any]:
        """Measure adapters on anchors: `{"anchors": …, "results": […]}`, and one metrics file for each.

        `report` hears how many of how many are done. Raises `AnchorsUnavailable`, `CheckpointDamaged`, `ModelError`.
        """
        anchors = await self.anchor_set(settings)
        report(0, len(subjects))
        contents = [await asyncio.to_thread(_content, subject) for subject in subjects]
        measured = await self._engine.measure(anchors, tuple(subjects), report, threading.Event())
        results = [
            {"checkpoint": subject.name, "against": subject.parent or BASE, **found}
            for subject, found in zip(subjects, measured.results, strict=True)
        ]
        common = {
            "anchors": measured.anchors,
            "base_hash": self._base_hash,
            "at": time.time(),
            "run": self._conditions(settings),
        }
        for subject, content, result in zip(subjects, contents, results, strict=True):
            await asyncio.to_thread(self._write, subject, {**result, "adapter_hash": content, **common})
        return {"anchors": measured.anchors, "results": results}

    def _conditions(self, settings: AnchorSettings) -> dict[str, Any]:
        anchors = {**asdict(settings), "folder": str(settings.folder)}
        config = {"base_model": self._facts.base_model, "anchors": anchors}
        return conditions(self._facts.backend, self._facts.device, settings.seed, config)

    def _write(self, subject: Subject, document: dict[str, Any]) -> None:
        """One file for each adapter, what it was compared with, and the anchors."""
        label = subject.name
        if subject.folder is not None and not _is_of(self._home, subject):  # other folders may have its name
            label = f"{subject.folder.resolve().name}-{document['adapter_hash'][:8]}"
        name = f"eval_{label}_vs_{document['against']}_{document['anchors']['hash'][:8]}.json"
        write_durably(self._home / "metrics" / name, (json.dumps(document, indent=2) + "\n").encode())


def _apart(rehearsed: tuple[Encoded, ...], anchors: AnchorSet | None) -> tuple[tuple[Encoded, ...], tuple[str, ...]]:
    """What is left to learn from without the rows that measure, and a note of how many those are.

    Without the `anchors` nobody can tell which those are, and nothing is left. Raises `AnchorsUnavailable` if all of
    the rows measure.
    """
    if not rehearsed:
        return (), ()
    if anchors is None:
        return (), ("data/anchors/rehearsal was not rehearsed: which rows measure is not known without the anchors",)
    measuring = {document.tokens for document in anchors.documents}
    left = tuple(row for row in rehearsed if row.tokens not in measuring)
    if len(left) == len(rehearsed):
        return rehearsed, ()
    if not left:
        raise AnchorsUnavailable("All rows in data/anchors/rehearsal are anchors that measure.", NOTHING_REHEARSED)
    both = len(rehearsed) - len(left)
    note = f"{both} of {len(rehearsed)} rows in data/anchors/rehearsal are not rehearsed: they are anchors that measure"
    return left, (note,)


def _is_of(home: Path, subject: Subject) -> bool:
    """Whether it is a checkpoint of this home, and not any folder."""
    return is_checkpoint_name(subject.name) and subject.folder == home / "adapters" / subject.name


def _content(subject: Subject) -> str | None:
    """The hash of an adapter's files; None for the base, and for one that cannot be read, nor measured then."""
    if subject.folder is None:
        return None
    digest = hashlib.sha256()
    try:
        for name in (CONFIG_FILE, ADAPTER_FILE):
            with (subject.folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError:
        return None
    return digest.hexdigest()


def subject_of(home: Path, name: str, against: str | None, base_hash: str) -> Subject:
    """A checkpoint of this home, or the base, beside `against` (None: its own parent).

    Raises `NotFound`, `CheckpointDamaged`, or `Conflict` for a checkpoint of another base.
    """
    if name == BASE:
        return Subject(BASE, None, against)
    folder = home / "adapters" / name
    if not is_checkpoint_name(name) or not folder.is_dir():
        raise NotFound(f"There is no checkpoint {name}.", "List the checkpoints to see their ids.")
    facts = folders.read(folder)
    if facts.get("base_hash") != base_hash:
        raise Conflict(f"{name} belongs to another base model.", "Start with --base-model as when it was trained.")
    try:
        digest, parent = facts["files"][ADAPTER_FILE], facts["parent"]
    except (KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{name}: its checkpoint.json lacks {error}.", "Restore it from a backup.") from error
    folders.verify(folder, {ADAPTER_FILE: digest})
    return Subject(name, folder, against or parent)


def all_subjects(home: Path, names: Iterable[str], against: str | None, base_hash: str) -> list[Subject]:
    """Those of `names` that are whole and of this base; damaged ones are logged. Raises `NotFound` if none is left."""
    found = []
    for name in names:
        try:
            found.append(subject_of(home, name, against, base_hash))
        except CheckpointDamaged as error:
            log.warning("left out", checkpoint=name, reason=error.message)
        except Conflict:  # of another base
            continue
    if not found:
        raise NotFound(
            "There is no checkpoint here yet.", "Teach something first, or measure the base: --checkpoint base."
        )
    return found


def checkpoint_names(home: Path) -> list[str]:
    """Every checkpoint folder in the home, oldest first."""
    names = [path.name for path in (home / "adapters").glob("A_*") if is_checkpoint_name(path.name)]
    return sorted(names, key=lambda name: int(name.rsplit("_", 1)[1]))


def is_checkpoint_name(name: str) -> bool:
    """Whether `name` is an id, and no path in disguise."""
    return re.fullmatch(r"A_\d{4}-\d\d-\d\d_\d+", name) is not None


def asked_for(settings: AnchorSettings, home: Path, changes: Mapping[str, Any]) -> AnchorSettings:
    """`settings` with `changes`; `local` by name is the home's own folder, whatever the base brings.

    Raises `InvalidRequest` for `local` with a data set.
    """
    if changes.get("provider") == "local" and changes.get("dataset"):
        raise InvalidRequest(
            f"The anchors of `local` are data/anchors/*.jsonl of the home, not {changes['dataset']}.",
            "Name the data set alone (its provider is hf), or leave it out.",
        )
    if changes.get("provider") == "local":
        settings = replace(settings, folder=home / "data" / "anchors")
    return replace(settings, **changes)


def anchor_settings(config: Config, home: Path) -> AnchorSettings:
    """What the configuration asks for; unset, the base's own anchors if it brings some, else none."""
    settings = config.evaluation
    folder = home / "data" / "anchors"
    provider = settings.anchor_provider
    if provider is None:
        where = resolve(config.base_model)
        own = own_anchors(where) if isinstance(where, Path) else None
        provider, folder = ("local", own) if own is not None else ("none", folder)
    return AnchorSettings(
        provider=provider,
        dataset=settings.anchor_dataset,
        split=settings.anchor_split,
        sample=settings.anchor_sample,
        columns=tuple(settings.anchor_columns),
        max_tokens=settings.anchor_max_tokens,
        seed=settings.anchor_seed,
        folder=folder,
    )
