"""Measuring, fusing and counting tokens without a service: the engine, its model or its tokenizer alone.

Nothing is trained or served.

With a service on the same home this may run beside it: checkpoints are only read, and what is kept about
anchors is written beside and renamed. It then holds a second copy of the base model in memory.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .config import Config, Loaded
from .config.bases import expanded
from .engine.thread import EngineThread
from .errors import HomeLocked, InvalidRequest, ModelError
from .evaluation.plan import Subject
from .evaluator import Evaluator, all_subjects, asked_for, checkpoint_names, subject_of
from .lora.encoding import ChatEncoder
from .messages import BASE, STABLE
from .store import HomeLock, Store


def evaluate(
    loaded: Loaded,
    checkpoints: Sequence[str] | None,
    against: str | None,
    adapter_path: Path | None,
    anchors: dict[str, Any],
    report: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Measure checkpoints of the home (None: all), or any adapter that mlx-lm reads. Raises `RadianceError`."""
    with contextlib.ExitStack() as stack:
        lock = HomeLock(loaded.home)
        with contextlib.suppress(HomeLocked):
            loaded.home.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            stack.callback(lock.release)
        return asyncio.run(_evaluate(loaded, checkpoints, against, adapter_path, anchors, report))


async def _evaluate(
    loaded: Loaded,
    checkpoints: Sequence[str] | None,
    against: str | None,
    adapter_path: Path | None,
    anchors: dict[str, Any],
    report: Callable[[int, int], None],
) -> dict[str, Any]:
    config = loaded.config
    training = config.training.model_copy(update={"distributed": "off"})
    rehearsal = config.rehearsal.model_copy(update={"ask_ahead": False})
    config = config.model_copy(update={"training": training, "rehearsal": rehearsal})
    engine = EngineThread(config, loaded.home, lambda error: None)
    try:
        facts = await engine.start()
        (loaded.home / "metrics").mkdir(parents=True, exist_ok=True)
        evaluator = Evaluator(config, loaded.home, engine, facts)
        subjects = _subjects(loaded.home, checkpoints, against, adapter_path, facts.base_hash)
        return await evaluator.evaluate(subjects, asked_for(evaluator.anchors, loaded.home, anchors), report)
    finally:
        await engine.stop()


def fuse(loaded: Loaded, checkpoint: str, adapter_path: Path | None, out: Path) -> dict[str, Any]:
    """Write the new folder `out`: the base with a checkpoint of the home, or any adapter that mlx-lm reads, folded in.

    `rounding_lost` of what it gives is the share of the adapter's change that the weights' precision has rounded away.
    Raises `RadianceError`.
    """
    from .engine import backend, fusing
    from .engine.model import load_base
    from .lora.files import load_adapter

    out = expanded(str(out))
    fusing.refuse_existing(out)
    backend.select(loaded.config.backend, loaded.config.memory)
    base = load_base(loaded.config, cpu=False)  # in its own dtype, also where it computes in another
    [subject] = _subjects(loaded.home, [checkpoint], None, adapter_path, base.fingerprint)
    if subject.folder is None:
        raise InvalidRequest("There is nothing to fold into the base.", "Name a checkpoint, or teach something first.")
    modules, lost = fusing.fuse(base, load_adapter(subject.folder), out)
    base_model = loaded.config.base_model
    facts = {"out": str(out), "base_model": base_model, "adapter": subject.name, "modules": modules}
    return {**facts, "rounding_lost": lost}


def encoder(config: Config) -> ChatEncoder:
    """What turns examples into tokens for the configured base; of a base on the hub only the tokenizer is fetched.

    Raises `RadianceError`.
    """
    from .engine.model import load_encoder

    return load_encoder(config)


def _subjects(
    home: Path, checkpoints: Sequence[str] | None, against: str | None, adapter_path: Path | None, base_hash: str
) -> list[Subject]:
    against = _resolved(home, against, base_hash) if against else None
    if against is not None:
        subject_of(home, against, None, base_hash)  # is it there, and whole?
    if adapter_path is not None:
        if not (adapter_path / "adapters.safetensors").is_file():
            raise ModelError(f"{adapter_path} is no adapter: it has no adapters.safetensors.", "Name its folder.")
        return [Subject(str(adapter_path), adapter_path, against)]
    if checkpoints is None:
        return all_subjects(home, checkpoint_names(home), against, base_hash)
    return [subject_of(home, _resolved(home, name, base_hash), against, base_hash) for name in checkpoints]


def _resolved(home: Path, name: str, base_hash: str) -> str:
    """`name`, or for "stable" what a service with this base would answer from; the base where there is nothing."""
    if name != STABLE:
        return name
    if not (home / "state" / "radiance.db").is_file():
        return BASE
    store = Store(home)
    try:
        return store.stable(base_hash) or BASE
    finally:
        store.close()
