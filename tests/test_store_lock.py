"""The lock of a home: one process has it, the others are told which."""

import json
import os
import signal
import sys
from datetime import datetime
from pathlib import Path

import pytest
from stores import FIRST_DAY, python

from radiance_mlx.errors import HomeLocked
from radiance_mlx.store import HomeLock

HOLD = """
import sys
from pathlib import Path
from radiance_mlx.store import HomeLock
with HomeLock(Path(sys.argv[1]), lambda: 1_770_638_400.0):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_the_home(tmp_path: Path) -> None:
    """It does not wait; it names the pid and the time; after a kill -9 the home is free at once."""
    process = python(HOLD, str(tmp_path))
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "held\n"
    since = datetime.fromtimestamp(FIRST_DAY).strftime("%Y-%m-%d %H:%M")
    with pytest.raises(HomeLocked) as caught:
        HomeLock(tmp_path).acquire()
    assert f"process {process.pid} " in caught.value.message
    assert since in caught.value.message
    assert caught.value.hint
    assert caught.value.details["pid"] == process.pid
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stdin.close()
    assert (tmp_path / "state/holder.json").exists()
    with HomeLock(tmp_path):
        assert json.loads((tmp_path / "state/holder.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "state/holder.json").exists()


def test_the_lock_is_free_after_its_block_and_holds_within_one_process(tmp_path: Path) -> None:
    """Two locks of one process exclude each other too; releasing twice, or from an error, is no fault."""
    lock = HomeLock(tmp_path)
    with lock, pytest.raises(HomeLocked, match=str(os.getpid())):
        HomeLock(tmp_path).acquire()
    lock.release()
    with pytest.raises(RuntimeError, match="inside"), lock:
        raise RuntimeError("inside")
    with HomeLock(tmp_path):
        pass


@pytest.mark.parametrize("left", [b"", b"[]", b'{"pid": "x"}', b"\xff"])
def test_an_unreadable_holder_file_is_no_obstacle(tmp_path: Path, left: bytes) -> None:
    """It is overwritten by the next holder; and a process that finds the home locked says what it knows."""
    lock = HomeLock(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state/holder.json").write_bytes(left)
    with lock:
        (tmp_path / "state/holder.json").write_bytes(left)
        with pytest.raises(HomeLocked, match="another process"):
            HomeLock(tmp_path).acquire()


def test_the_holder_file_keeps_no_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token on the command line does not get into a file."""
    monkeypatch.setattr(sys, "argv", ["/x/radiance-mlx", "run", "--token", "secret"])
    with HomeLock(tmp_path):
        text = (tmp_path / "state/holder.json").read_text()
    assert json.loads(text)["command"] == "radiance-mlx run"
    assert "secret" not in text


def test_who_holds_the_home_is_named_as_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m` hands the program the path of a file that nobody types."""
    monkeypatch.setattr(sys, "argv", ["/x/radiance_mlx/__main__.py", "run"])
    with HomeLock(tmp_path), pytest.raises(HomeLocked, match=r"\(python -m radiance_mlx run\)"):
        HomeLock(tmp_path).acquire()
