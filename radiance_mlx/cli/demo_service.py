"""The demo's own service: a real subprocess on a home of its own, stopped and cleared away at the end."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..client import Client, read_server_file
from ..errors import NotReady

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
LOG = "demo.log"
#: a session of its own: a Ctrl-C in the terminal reaches the demo alone, which then stops the service
APART = os.name == "posix"


@contextmanager
def demo_service(keep: bool) -> Iterator[tuple[Client, Path]]:
    """A client of a fresh service on nano, ready to answer, and its home. Raises `NotReady` with its log."""
    home = Path(tempfile.mkdtemp(prefix="radiance-demo-"))
    process = None
    try:
        with (home / LOG).open("wb") as log:
            process = subprocess.Popen(
                _command(home), stdout=log, stderr=log, env=_environment(), start_new_session=APART
            )
        with Client(_wait_for_url(process, home), home=home) as client:
            _wait_until_ready(process, client, home)
            yield client, home
    finally:
        if process:
            _stop(process)
        if not keep:
            shutil.rmtree(home, ignore_errors=True)


def _command(home: Path) -> list[str]:
    settings = ["--port", "0", "--base-model", "nano", "--update-mode", "immediate"]
    return [sys.executable, "-m", "radiance_mlx", "run", "--home", str(home), *settings]


def _environment() -> dict[str, str]:
    """Ours without RADIANCE_…: the demo is the same whatever is configured here."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RADIANCE_")}


def _wait_for_url(process: "subprocess.Popen[bytes]", home: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        facts = read_server_file(home)
        if facts:
            return str(facts["url"])
        _still_running(process, home)
        time.sleep(0.05)
    raise NotReady("The service did not begin to listen in time.", _tail(home))


def _wait_until_ready(process: "subprocess.Popen[bytes]", client: Client, home: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not client.is_ready():
        _still_running(process, home)
        if time.monotonic() > deadline:
            raise NotReady("The service did not become ready in time.", _tail(home))
        time.sleep(0.05)


def _still_running(process: "subprocess.Popen[bytes]", home: Path) -> None:
    code = process.poll()
    if code is not None:
        raise NotReady(f"The service ended with exit code {code} before it was ready.", _tail(home))


def _tail(home: Path, lines: int = 15) -> str:
    log = (home / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(["The end of its log:", *log[-lines:]]) if log else "Its log is empty."


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
