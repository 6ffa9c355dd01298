"""One checkpoint's folder: complete or not there.

A folder holds what mlx-lm reads (`adapters.safetensors`, `adapter_config.json`), the optimizer's state, and
`checkpoint.json` with parent, jobs, data hash, configuration, metrics and the sha256 of each other file.
Files only: no arrays, no database.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import CheckpointDamaged
from ..store.files import sync_file, sync_folder

CHECKPOINT_FILE = "checkpoint.json"
_BESIDE = ".unfinished-"
_ASIDE = f"{_BESIDE}old-"


def unfinished(parent: Path, name: str) -> Path:
    """An empty folder to write `name`'s files into, on the same file system as its final place."""
    folder = parent / f"{_BESIDE}{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """Name → sha256 of every file but `checkpoint.json`."""
    return {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.name != CHECKPOINT_FILE}


def commit(written: Path, final: Path, facts: dict[str, Any]) -> dict[str, str]:
    """Make an unfinished folder the checkpoint `final`; returns the hashes. Replaces a folder of that name.

    When this returns, the checkpoint survives a power cut; when it does not, `final` is as it was, at the latest
    after the next `remove_unfinished`.
    """
    files = hashes(written)
    document = {**facts, "files": files}
    (written / CHECKPOINT_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    replace_folder(written, final)
    return files


def replace_folder(written: Path, final: Path) -> None:
    """Sync `written` and rename it to `final`, moving a former folder out of the way first."""
    for file in written.iterdir():
        sync_file(file)
    sync_folder(written)
    if final.exists():
        old = final.with_name(f"{_ASIDE}{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        os.rename(written, final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(written, final)
    sync_folder(final.parent)


def read(folder: Path) -> dict[str, Any]:
    """`checkpoint.json` of a folder. Raises `CheckpointDamaged`."""
    try:
        document = json.loads((folder / CHECKPOINT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointDamaged(f"{folder.name}: checkpoint.json is missing or not JSON.") from error
    if not isinstance(document, dict) or not isinstance(document.get("files"), dict):
        raise CheckpointDamaged(f"{folder.name}: checkpoint.json does not describe a checkpoint.")
    return document


def verify(folder: Path, files: dict[str, str]) -> None:
    """Raise `CheckpointDamaged` unless every file of `files` is there with its recorded hash."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointDamaged(f"{folder.name}: {name} is missing.")
        if sha256(file) != expected:
            raise CheckpointDamaged(f"{folder.name}: {name} differs from its recorded sha256.")


def remove_unfinished(parent: Path) -> None:
    """Delete what a crash left half written, and put back what it had moved out of the way."""
    if not parent.is_dir():
        return
    for old in parent.glob(f"{_ASIDE}*"):
        final = old.with_name(old.name.removeprefix(_ASIDE))
        if not final.exists():
            os.rename(old, final)
    for folder in parent.glob(f"{_BESIDE}*"):
        shutil.rmtree(folder, ignore_errors=True)
