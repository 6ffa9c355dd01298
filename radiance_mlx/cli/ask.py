"""`search`: ask the running service."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import AsJson, ConfigFile, Home, Token, Url, client_for, examples

if TYPE_CHECKING:
    from ..client import Client

EXAMPLES = examples(
    '% search "Where does Ada Abbott live?"',
    '% search "Be brief: what is LoRA?" --temperature 0 --max-tokens 64 --checkpoint base',
    "git diff | % search - --system 'Write a commit message.' --json",
)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog=EXAMPLES)(search)


def search(
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from stdin.", metavar="PROMPT")],
    system: Annotated[str | None, typer.Option(help="A system message.", show_default=False)] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Who answers: an id, stable or base. [dim]\\[default: stable][/dim]")
    ] = None,
    use_training_adapter: Annotated[
        bool, typer.Option("--use-training-adapter", help="Let the weights in training answer.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(help="[dim]\\[default: 256][/dim]")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. [dim]\\[default: 0.2][/dim]")] = None,
    top_p: Annotated[float | None, typer.Option(help="[dim]\\[default: 1.0][/dim]")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", show_default=False)] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; repeatable.", show_default=False)
    ] = None,
    stream: Annotated[
        bool | None, typer.Option(help="Show the answer as it comes. [dim]\\[default: on a terminal][/dim]")
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    home: Home = None,
    config: ConfigFile = None,
    token: Token = None,
) -> None:
    """Ask the service; the latest stable checkpoint answers.

    With --json and --stream each event is one line of JSON.
    """
    options: dict[str, Any] = {
        "system": system,
        "checkpoint": checkpoint,
        "use_training_adapter": use_training_adapter or None,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
    }
    question = read_prompt(prompt)
    live = stream if stream is not None else not as_json and sys.stdout.isatty()
    with client_for(url, home, config, token) as client:
        if not live:
            _show_whole(client, question, options, as_json)
        elif as_json:
            for event in client.search_stream(question, **options).events():
                output.print_json(event)
        else:
            _show_live(client.search_stream(question, **options).events())


def read_prompt(prompt: str) -> str:
    """The prompt itself, or stdin for `-`. Raises `BadInput` when it is empty, not UTF-8 or cannot be read."""
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode().strip()
        except UnicodeDecodeError as error:
            raise output.BadInput(f"stdin is not UTF-8: {error}") from error
        except OSError as error:
            raise output.BadInput(f"stdin cannot be read: {error.strerror}.") from error
    if not prompt.strip():
        raise output.BadInput("The prompt is empty.", 'Like this: search "Where does Ada Abbott live?"')
    return prompt


def _show_whole(client: "Client", question: str, options: dict[str, Any], as_json: bool) -> None:
    answer = client.search(question, **options).raw
    if as_json:
        output.print_json(answer)
        return
    if answer.get("reasoning"):
        output.remark(answer["reasoning"])
    _write(str(answer.get("response", "")) + "\n")
    _closing(answer)


def _show_live(events: Iterator[dict[str, Any]]) -> None:
    """Write the pieces as they come. What was written ends with a newline, also when it breaks off."""
    thinking, answer, anything = False, {}, False
    try:
        for event in events:
            if "reasoning" in event and "response" not in event:
                output.err().print(output.printable(event["reasoning"]), style="dim", end="", soft_wrap=True)
                thinking = True
            elif "text" in event:
                if thinking:
                    output.err().print()
                    thinking = False
                anything = True
                _write(event["text"])
            else:
                answer = event
    finally:
        if anything or thinking:
            _write("\n")
    _closing(answer)


def _write(text: str) -> None:
    """Model text to stdout: as it is into a pipe, without control characters onto a terminal."""
    sys.stdout.write(output.printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _closing(answer: dict[str, Any]) -> None:
    from . import render

    output.remark(render.answer_line(answer))
