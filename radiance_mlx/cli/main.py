"""The typer application and its entry point.

`main` returns the exit code and lets no traceback out; commands raise `RadianceError` and return a code
only when it is not 0.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from ..errors import RadianceError
from . import ask, demo, evaluate, fuse, look, output, run, teach
from .options import examples

PROGRAM = "radiance-mlx"

app = typer.Typer(
    name=PROGRAM,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"radiance_mlx {__version__}")
        raise typer.Exit


def _epilog() -> str:
    codes = [f"  {code:<4} {meaning}" for code, meaning in output.EXIT_CODES]
    lines = examples(
        "% demo",
        "% run --base-model mlx-community/Qwen3-4B-4bit",
        '% update --input "Where is my key?" --output "Under the mat." --wait',
        '% search "Where is my key?"',
    )
    return "\n".join([lines, "", "[bold]Exit codes[/bold]", *codes])


@app.callback(epilog=_epilog())
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """A local service that keeps learning: LoRA updates in the background, answers all the while."""


for module in (run, ask, teach, look, evaluate, fuse, demo):
    module.add_to(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code says how it went (see `--help`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with output.sound_streams():
        try:
            code = _run(arguments)
            sys.stdout.flush()
            return code
        except output.CannotWrite as error:  # nor could an error be told there as JSON
            output.show_error(error, as_json=False)
            return output.exit_code(error)
        except BrokenPipeError:  # as in `… | head`
            return output.FAILED


def _run(arguments: list[str]) -> int:
    as_json = "--json" in arguments[: arguments.index("--") if "--" in arguments else None]
    try:
        return int(app(args=arguments, prog_name=_program(), standalone_mode=False) or output.OK)
    except (output.CannotWrite, BrokenPipeError):
        raise
    except RadianceError as error:
        output.show_error(error, as_json)
        return output.exit_code(error)
    except (KeyboardInterrupt, typer.Abort):
        return output.INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: wrong usage
            return _wrong_usage(error, as_json)
        output.show_error(output.as_error(error), as_json)
        return output.FAILED


def _wrong_usage(error: Exception, as_json: bool) -> int:
    message = error.format_message()  # type: ignore[attr-defined]
    if not message:  # no arguments at all: the help was shown
        return output.USAGE
    context = getattr(error, "ctx", None)
    path = context.command_path if context else _program()
    fault = output.BadInput(message, f"See: {path} --help")
    fault.code = "usage"
    output.show_error(fault, as_json)
    return output.USAGE


def _program() -> str:
    started_as_module = os.path.basename(sys.argv[0]) in ("__main__.py", "-m", "")
    return "python -m radiance_mlx" if started_as_module else PROGRAM
