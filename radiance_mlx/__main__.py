"""`python -m radiance_mlx`. What loads slowly is imported last, so that a signal before that is answered too."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any


def stop_quietly_while_starting(arguments: Sequence[str]) -> None:
    """Let SIGINT and SIGTERM end `run` with exit code 0, at once and silently, until the service handles them.

    That is safe: what is durable is so after any end, `kill -9` included.
    """
    if arguments[:1] == ["run"]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)


def _stop(*_: Any) -> None:
    os._exit(0)


def main() -> int:
    """The command line that this process was started with; the exit code."""
    stop_quietly_while_starting(sys.argv[1:])
    from .cli.main import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
