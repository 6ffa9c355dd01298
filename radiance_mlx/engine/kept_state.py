"""The state of the batch in training, kept on disk every so often, so that it can go on after a crash.

One folder, whole or not there. Keeping it is a precaution: what cannot be written now is no fault of the training.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.folder import replace_folder, unfinished
from ..lora import files

log = logging.getLogger(__name__)
Arrays = dict[str, mx.array]


class KeptState:
    """`folder` of one batch. Syncing and renaming happen on a thread of files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writing: Future[None] | None = None
        self._files = ThreadPoolExecutor(1, thread_name_prefix="radiance-files")

    @property
    def there(self) -> bool:
        """Whether something is kept."""
        return self._folder.is_dir()

    def progress(self) -> dict[str, Any]:
        """The plain part. Raises `OSError` or `ValueError`."""
        return dict(json.loads((self._folder / files.PROGRESS_FILE).read_text(encoding="utf-8")))

    def arrays(self, name: str) -> dict[str, mx.array] | None:
        """One file's arrays, None if it was not written. Raises `CheckpointDamaged`."""
        file = self._folder / name
        return files.load_arrays(file) if file.is_file() else None

    def keep(self, arrays: Mapping[str, Arrays], progress: Mapping[str, Any], *, wait: bool = False) -> None:
        """Write `arrays` by file name and `progress`; nothing while the last time is not through, unless `wait`."""
        if self._writing is not None and not self._writing.done() and not wait:
            return
        try:
            if self._writing is not None:
                self._writing.result()
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            written = unfinished(self._folder.parent, self._folder.name)
            for name, values in arrays.items():
                files.save_arrays(written / name, values)
            (written / files.PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")
            self._writing = self._files.submit(replace_folder, written, self._folder)
            if wait:
                self._writing.result()
        except (OSError, RuntimeError) as error:
            self._writing = None
            log.warning("the training's state cannot be kept in %s: %s", self._folder, error)

    def close(self, *, forget: bool) -> None:
        """Let go of everything; with `forget` what is kept goes too."""
        with suppress(OSError, RuntimeError):
            if self._writing is not None:
                self._writing.result()
        self._files.shutdown()
        if forget:
            shutil.rmtree(self._folder, ignore_errors=True)
