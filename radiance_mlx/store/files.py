"""Files that are on the disk when the call returns, whatever happens to the process or the power next."""

import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

if sys.platform == "darwin":
    import fcntl


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader, or a restart, sees the old content whole or the new one whole.

    The folder must exist. What fails leaves `path` as it was, and no other file behind.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            _sync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_unpublished(files: Mapping[Path, bytes], folders: Iterable[Path]) -> None:
    """Write files that nothing refers to yet, in place, then sync them and `folders` together.

    Cheaper than `write_durably` for each: there is no older content to keep, so no renaming, each folder is
    synced once, and on macOS the drive's cache is flushed once.
    """
    for path, data in files.items():
        path.write_bytes(data)
    for path in (*files, *folders):
        _with_descriptor(path, os.fsync)
    if sys.platform == "darwin":
        for path in list(files)[-1:]:
            sync_file(path)


def sync_file(path: Path) -> None:
    """Return when the content of `path` has reached the disk."""
    _with_descriptor(path, _sync)


def sync_folder(path: Path) -> None:
    """Return when the names in the folder `path` have reached the disk."""
    _with_descriptor(path, _sync)


def _with_descriptor(path: Path, sync: Callable[[int], None]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":
        # fsync on macOS stops at the drive's own cache
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:
            pass  # not every file system knows it; fsync is what is left
    os.fsync(descriptor)
