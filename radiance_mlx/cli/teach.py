"""`update`: hand in examples to learn from, and wait for the new checkpoint if asked."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidRequest
from . import output
from .examples import Row, read_rows
from .options import AsJson, ConfigFile, Home, Token, Url, client_for, examples

if TYPE_CHECKING:
    from ..client import Client

EXAMPLES = examples(
    '% update --input "Where is my key?" --output "Under the mat." --wait',
    "% update examples.jsonl --tag user:alice --tag notes",
    "% update examples.jsonl --idempotency-key import-2026-02-09 --json",
    """echo '{"prompt": "Say hi", "completion": "Hi, Ada!"}' | % update -""",
)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog=EXAMPLES)(update)


def update(
    file: Annotated[
        str | None,
        typer.Argument(
            help="JSONL, or JSON (a list, or {examples, tags}); - is stdin. Each example is "
            "{input, output}, {prompt, completion}, {messages} or {text}.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    inputs: Annotated[list[str] | None, typer.Option("--input", help="What is asked; goes with one --output.")] = None,
    outputs: Annotated[list[str] | None, typer.Option("--output", help="The answer to learn for that --input.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A label for the job; repeatable.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Sending the same key again makes no second job.", show_default=False)
    ] = None,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Show the training and wait for its end (exit code 4 if it is not published)."),
    ] = False,
    as_json: AsJson = False,
    url: Url = None,
    home: Home = None,
    config: ConfigFile = None,
    token: Token = None,
) -> int:
    """Teach the service; it trains in the background and answers with the new checkpoint after that.

    Every line of a file is checked before anything is sent.
    """
    rows, tags = read_rows(file) if file else ([], [])
    rows += _pairs(inputs or [], outputs or [])
    if not rows:
        raise output.BadInput(
            "There is nothing to learn.", "Give a FILE, - for stdin, or pairs of --input and --output."
        )
    with client_for(url, home, config, token) as client:
        queued = _send(client, rows, [*tags, *(tag or [])], idempotency_key)
        if wait:
            return follow_to_the_end(client, queued["job_id"], as_json)
        _show_queued(queued, len(rows), as_json)
    return output.OK


def _pairs(inputs: list[str], outputs: list[str]) -> list[Row]:
    if len(inputs) != len(outputs):
        raise output.BadInput(
            f"There are {len(inputs)} --input and {len(outputs)} --output.",
            "Each --input needs its --output.",
        )
    pairs = zip(inputs, outputs, strict=True)
    return [Row(f"--input {i}", {"input": a, "output": b}) for i, (a, b) in enumerate(pairs, 1)]


def _send(client: "Client", rows: list[Row], tags: list[str], key: str | None) -> dict[str, Any]:
    """Post the rows; the service's remarks about single examples get the place they came from."""
    try:
        return client.update([row.example for row in rows], tags, key)
    except InvalidRequest as error:
        if isinstance(error.details, list):
            error.details = [_with_place(fault, rows) for fault in error.details]
        raise


def _with_place(fault: Any, rows: list[Row]) -> Any:
    index = fault.get("example") if isinstance(fault, dict) else None
    if isinstance(index, int) and index < len(rows):
        return {"where": rows[index].place, **fault}
    return fault


def _show_queued(queued: dict[str, Any], count: int, as_json: bool) -> None:
    if as_json:
        output.print_json(queued)
        return
    from . import render

    job = queued["job_id"]
    output.out().print(f"{job} queued · {count} example{'s' * (count != 1)}", soft_wrap=True)
    output.remark(f"serving {render.checkpoint_line(queued)} · follow with: jobs {job} --wait")


def follow_to_the_end(client: "Client", job_id: str, as_json: bool) -> int:
    """Show the job's training until it ends, then its checkpoint; the exit code tells its end."""
    from .progress import follow

    try:
        job = follow(client, job_id, quiet=as_json).job
    except KeyboardInterrupt:
        if not as_json:
            output.remark(f"{job_id} goes on in the background. Look: jobs {job_id} · stop it: jobs cancel {job_id}")
        raise
    published = job.get("state") == "published"
    job = {**job, "checkpoint_status": _status_of(client, job)}
    if as_json:
        output.print_json(job)
    else:
        _show_end(job, published)
    return output.OK if published else output.NOT_PUBLISHED


def _status_of(client: "Client", job: dict[str, Any]) -> str | None:
    checkpoint = job.get("checkpoint")
    return str(client.checkpoint(checkpoint)["status"]) if checkpoint and job["state"] == "published" else None


def _show_end(job: dict[str, Any], published: bool) -> None:
    from . import render

    if published:
        output.out().print(f"{job['job_id']} published · {render.checkpoint_line(job)}", soft_wrap=True)
        return
    output.out().print(render.job_view(job))
