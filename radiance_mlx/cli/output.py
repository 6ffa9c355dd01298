"""What every command writes with: two consoles, JSON, errors, and the exit codes.

Machine output goes to stdout alone; whatever is said to people besides the result goes to stderr. Text
from models and users is never read as markup, and its control characters never reach a terminal.
"""

import json
import sys
import traceback
from functools import cache
from typing import TYPE_CHECKING, Any

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


def exit_code(error: RadianceError) -> int:
    """The exit code for `error`."""
    if isinstance(error, ServiceUnreachable):
        return UNREACHABLE
    return USAGE if isinstance(error, (ConfigError, BadInput)) else FAILED


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
