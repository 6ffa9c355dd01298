"""What every command writes with: two consoles, JSON, errors, and the exit codes.

Machine output goes to stdout alone; whatever is said to people besides the result goes to stderr. Text
from models and users is never read as markup, and its control characters never reach a terminal.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import ConfigError, InvalidRequest, RadianceError, ServiceUnreachable

if TYPE_CHECKING:
    from rich.console import Console

OK, FAILED, USAGE, UNREACHABLE, NOT_PUBLISHED, INTERRUPTED = 0, 1, 2, 3, 4, 130
EXIT_CODES = (
    (OK, "done"),
    (FAILED, "the service or the command reports an error"),
    (USAGE, "wrong usage, input or configuration"),
    (UNREACHABLE, "no service answers"),
    (NOT_PUBLISHED, "--wait: the job ended other than published"),
    (INTERRUPTED, "interrupted"),
)
PIPE_WIDTH = 160  # of tables that no terminal shows


class BadInput(InvalidRequest):
    """What was handed to a command cannot be used; nothing was sent."""


class CannotWrite(RadianceError):
    """stdout does not take the result: a full disk, a closed descriptor. (A reader that left: `BrokenPipeError`.)"""

    code = "output_failed"


def exit_code(error: RadianceError) -> int:
    """The exit code for `error`; what was typed is as wrong when the service says so as when a command does."""
    if isinstance(error, ServiceUnreachable):
        return UNREACHABLE
    return USAGE if isinstance(error, (ConfigError, InvalidRequest)) else FAILED


# --- the streams ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def sound_streams() -> Iterator[None]:
    """Inside, all three standard streams are there, and their faults are no bugs.

    What stdout does not take is `CannotWrite`, or `BrokenPipeError`; what stderr does not take is dropped. A
    character that a terminal cannot show becomes a question mark.
    """
    _fill_closed()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="replace")
    out_stream: Any = _Guarded(sys.stdout, told=True)
    err_stream: Any = _Guarded(sys.stderr, told=False)
    with contextlib.redirect_stdout(out_stream), contextlib.redirect_stderr(err_stream):
        yield


def _fill_closed() -> None:
    """A stream that the caller closed (`>&-`): nothing comes from stdin, stdout refuses, stderr is silent."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # else the next file or socket would get this number, and what is meant for the stream
            os.set_inheritable(os.open(os.devnull, os.O_WRONLY if fd == 2 else os.O_RDONLY), True)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


class _Guarded:
    """A text stream for output. After a fault it leads nowhere; if `told`, every write from then on raises it."""

    def __init__(self, stream: TextIO, told: bool) -> None:
        self._stream, self._told = stream, told
        self._fault: Exception | None = None

    def write(self, text: str) -> int:
        if self._fault is None:
            self._do(lambda: self._stream.write(text))
        elif self._told:
            raise self._fault
        return len(text)

    def flush(self) -> None:
        if self._fault is None:
            self._do(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _do(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            with contextlib.suppress(OSError):  # or Python's flush at its end fails once more
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            gone = isinstance(error, BrokenPipeError)
            said = f"The result cannot be written: {error.strerror or error}."
            self._fault = error if gone else CannotWrite(said)
            if self._told:
                raise self._fault from None


# --- what is written ------------------------------------------------------------------------------------


@cache
def out() -> "Console":
    """The console of results."""
    return _console(stderr=False)


@cache
def err() -> "Console":
    """The console of remarks, progress and errors."""
    return _console(stderr=True)


def _console(stderr: bool) -> "Console":
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def printable(text: str) -> str:
    """`text` without control characters but for newline and tab."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def remark(text: str) -> None:
    """A dim line on stderr."""
    err().print(printable(text), style="dim", soft_wrap=True)


def warn(text: str, hint: str) -> None:
    """What was done, but not as somebody would expect; and what to do, on stderr."""
    from rich.text import Text

    err().print(Text.assemble(("warning: ", "bold yellow"), printable(text)), soft_wrap=True)
    remark(hint)


def show_error(error: RadianceError, as_json: bool) -> None:
    """`error` as one red line and its hint on stderr, or as JSON on stdout."""
    if as_json:
        print_json({"error": error.as_dict()})
        return
    from rich.text import Text

    message = Text.assemble(("error: ", "bold red"), printable(error.message))
    err().print(message, soft_wrap=True)
    for line in _details(error):
        err().print(f"  - {printable(line)}", soft_wrap=True)
    if error.hint:
        remark(error.hint)


def _details(error: RadianceError) -> list[str]:
    """The faults that a request's error lists, one line each (a configuration's stand in its message)."""
    if not isinstance(error, InvalidRequest) or not isinstance(error.details, list):
        return []
    lines = [_detail(fault) for fault in error.details]
    return [line for line in lines if line not in error.message]


def _detail(fault: Any) -> str:
    """`line 3: output: Field required`, of `{where, problems: [{field, problem}]}` or a part of that."""
    if not isinstance(fault, dict):
        return str(fault)
    place = fault.get("where") or (f"example {fault['example'] + 1}" if "example" in fault else "")
    problems = "; ".join(_detail(problem) for problem in fault.get("problems") or [])
    words = [place, fault.get("field"), fault.get("problem") or problems]
    return ": ".join(str(word) for word in words if word)


def as_error(bug: Exception) -> RadianceError:
    """An exception that nobody expected, as an error with the place where it arose."""
    frame = traceback.extract_tb(bug.__traceback__)[-1]
    error = RadianceError(
        f"Unexpected {type(bug).__name__}: {bug}", f"This is a bug, at {frame.filename}:{frame.lineno}."
    )
    error.code = "internal_error"
    return error
