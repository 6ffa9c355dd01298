"""What is kept of bases that were used before: a folder for each, of which those that were used last stay.

Somebody who goes back to a base finds it as it was; of somebody who tries one base after the other, the disk does not
fill up. What is deleted is only a cache: the base is asked again.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)
#: folders of other bases that stay beside that of the base in use
FORMER = 2
NAME_LENGTH = 16
#: only what was named by the service is ever deleted
_NAME = re.compile(rf"[0-9a-f]{{{NAME_LENGTH}}}")


def folder_of(place: Path, fingerprint: str) -> Path:
    """Where in `place` it is kept of the base with this fingerprint."""
    return place / fingerprint[:NAME_LENGTH]


def leave_former(used: Path) -> None:
    """The folder `used` is in use from now on: the others beside it go, but for the last used."""
    with contextlib.suppress(OSError):  # if it is not there yet, it will be new
        os.utime(used)
    others = []
    for folder in used.parent.glob("*"):
        with contextlib.suppress(OSError):
            if folder != used and _NAME.fullmatch(folder.name) and folder.is_dir():
                others.append((folder.stat().st_mtime_ns, folder))
    former = [folder for _, folder in sorted(others, reverse=True)[FORMER:]]
    for folder in former:
        shutil.rmtree(folder, ignore_errors=True)
    if former:
        log.info("what former bases said was deleted", place=str(used.parent), bases=[each.name for each in former])
