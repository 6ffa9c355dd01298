"""`update`: hand in examples to learn from, and wait for the new checkpoint if asked."""

from contextlib import ExitStack
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..rows import SHAPES
from ..rows.columns import parse_map
from ..rows.intake import Intake, Taken
from . import output
from .options import AsJson, ConfigFile, Home, Token, Url, client_for, examples
from .parts import Spool, send
from .preview import preview
from .sources import SHOWN_FAULTS, bad_rows, source_of_dataset, source_of_file, source_of_pairs, told_as_bad_input

if TYPE_CHECKING:
    from ..client import Client

EXAMPLES = examples(
    '% update --input "Where is my key?" --output "Under the mat." --wait',
    "% update examples.jsonl --tag user:alice --tag notes",
    "% update questions.csv --map input=question,output=answer --dry-run",
    "% update --dataset squad --split 'train[:100]' --map input=question,output=answers.text.0",
    "% update examples.jsonl --idempotency-key import-2026-02-09 --json",
    """echo '{"prompt": "Say hi", "completion": "Hi, Ada!"}' | % update -""",
)


class Kind(StrEnum):
    """Formats of files."""

    jsonl = "jsonl"
    json = "json"
    csv = "csv"
    tsv = "tsv"


class Answers(StrEnum):
    """What of a chat is learnt."""

    last = "last"
    all = "all"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog=EXAMPLES)(update)


def update(
    file: Annotated[
        str | None,
        typer.Argument(
            help="JSONL, JSON, CSV or TSV; - is stdin. Each row is a chat ({messages}, OpenAI's or mlx-lm's), "
            "{input, output}, {prompt, completion}, Alpaca, ShareGPT or {text}.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    inputs: Annotated[list[str] | None, typer.Option("--input", help="What is asked; goes with one --output.")] = None,
    outputs: Annotated[list[str] | None, typer.Option("--output", help="The answer to learn for that --input.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="A data set: hub name, folder or file.", metavar="NAME", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="Of the data set; also as train[:100].")] = "train",
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--map", help="What columns hold: input=question,output=answer.", metavar="KEY=COLUMN,…", show_default=False
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many rows.", show_default=False)] = None,
    answers: Annotated[
        Answers | None,
        typer.Option(help="What of a chat without weights is learnt. Else last; all for ShareGPT.", show_default=False),
    ] = None,
    kind: Annotated[
        Kind | None, typer.Option("--format", help="Of the file. Else what its name says.", show_default=False)
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of the file.")] = "utf-8",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out; else nothing is sent.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show how rows are understood, and their tokens; send nothing.")
    ] = False,
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

    Every row is checked before anything is sent.
    """
    every = None if answers is None else answers is Answers.all
    mapped = parse_map(columns or [])
    with ExitStack() as stack:
        sources = [source_of_file(stack, file, kind and kind.value, encoding)] if file else []
        sources += [source_of_dataset(dataset, split)] if dataset else []
        pairs = [source_of_pairs(inputs or [], outputs or [])] if inputs or outputs else []
        if not sources and not pairs:
            raise output.BadInput(
                "There is nothing to learn.", "Give a FILE, - for stdin, a --dataset, or pairs of --input and --output."
            )
        intakes = [Intake(source, mapped, every_answer=every, limit=limit) for source in sources]
        intakes += [Intake(source) for source in pairs]
        if dry_run:
            return preview(intakes, lambda: client_for(url, home, config, token), home, config, as_json)
        spool = stack.enter_context(Spool())
        for intake in intakes:
            _take(intake, spool, skip_bad, as_json)
        tags = [*(t for source in sources for t in source.tags), *(tag or [])]
        with client_for(url, home, config, token) as client:
            return _send_all(client, spool, tags, idempotency_key, wait, as_json)


def _take(intake: Intake, spool: Spool, skip_bad: bool, quiet: bool) -> None:
    """All good rows into the spool. Raises `BadInput` if none is good, and for bad ones that are not to be skipped."""
    name = intake.source.name
    with told_as_bad_input(name):
        for row in intake:
            if isinstance(row, Taken) and (skip_bad or not intake.refused):
                spool.add(row.place, row.examples)
    if intake.refused and not skip_bad:
        raise bad_rows(name, intake.refused)
    if not intake.examples:
        refused = f": all of {len(intake.refused)} rows are bad" if intake.refused else ""
        raise output.BadInput(f"{name} holds no examples{refused}.", f"One a row: {SHAPES}.", *_shown(intake))
    if quiet:
        return
    for said in _remarks(intake):
        output.remark(said)


def _shown(intake: Intake) -> list[list[str]]:
    return [[str(one) for one in intake.refused[:SHOWN_FAULTS]]] if intake.refused else []


def _remarks(intake: Intake) -> list[str]:
    """What was done with rows that somebody may not expect."""
    said = list(intake.source.remarks)
    if intake.left_out:
        said.append(f"{intake.columns}; columns left out: {', '.join(intake.left_out)}")
    if intake.refused:
        said += [f"left out: {one}" for one in intake.refused[:SHOWN_FAULTS]]
        said.append(f"{len(intake.refused)} of {intake.rows} rows of {intake.source.name} were bad and are left out")
    return said


def _send_all(client: "Client", spool: Spool, tags: list[str], key: str | None, wait: bool, as_json: bool) -> int:
    """Post, show what was accepted, and wait for the jobs if wanted; of several the worst exit code counts."""
    answers = []
    for answer in send(client, spool, tags, key):
        answers.append(answer)
        if not as_json and not (wait and answer["of"] == 1):
            _show_queued(answer)
    jobs = [str(answer["job_id"]) for answer in answers]
    if wait and len(jobs) == 1:
        return follow_to_the_end(client, jobs[0], as_json)
    ended = [follow_job(client, job_id, quiet=as_json) for job_id in jobs] if wait else []
    if as_json:
        output.print_json(_summary(answers, ended))
    else:
        for job in ended:
            _show_end(job, job["state"] == "published")
    return output.OK if all(job["state"] == "published" for job in ended) else output.NOT_PUBLISHED


def _summary(answers: list[dict[str, Any]], ended: list[dict[str, Any]]) -> dict[str, Any]:
    """One update as the service answers it; of several the last one's, and all their jobs."""
    last = {key: value for key, value in answers[-1].items() if key not in ("part", "of")}
    if len(answers) == 1:
        return {key: value for key, value in last.items() if key != "examples"}
    jobs = ended or [{key: answer[key] for key in ("job_id", "queued", "examples")} for answer in answers]
    return {**last, "examples": sum(answer["examples"] for answer in answers), "parts": len(answers), "jobs": jobs}


def _show_queued(queued: dict[str, Any]) -> None:
    from . import render

    job, count = queued["job_id"], queued["examples"]
    part = f"part {queued['part']} of {queued['of']}: " if queued["of"] > 1 else ""
    output.out().print(f"{part}{job} queued · {count} example{'s' * (count != 1)}", soft_wrap=True)
    output.remark(f"serving {render.checkpoint_line(queued)} · follow with: jobs {job} --wait")


def follow_to_the_end(client: "Client", job_id: str, as_json: bool) -> int:
    """Show the job's training until it ends, then its checkpoint; the exit code tells its end."""
    job = follow_job(client, job_id, quiet=as_json)
    published = job.get("state") == "published"
    if as_json:
        output.print_json(job)
    else:
        _show_end(job, published)
    return output.OK if published else output.NOT_PUBLISHED


def follow_job(client: "Client", job_id: str, *, quiet: bool) -> dict[str, Any]:
    """The job at its end, with the status of its checkpoint."""
    from .progress import follow

    try:
        job = follow(client, job_id, quiet=quiet).job
    except KeyboardInterrupt:
        if not quiet:
            output.remark(f"{job_id} goes on in the background. Look: jobs {job_id} · stop it: jobs cancel {job_id}")
        raise
    return {**job, "checkpoint_status": _status_of(client, job)}


def _status_of(client: "Client", job: dict[str, Any]) -> str | None:
    checkpoint = job.get("checkpoint")
    return client.checkpoint(checkpoint).status if checkpoint and job["state"] == "published" else None


def _show_end(job: dict[str, Any], published: bool) -> None:
    from . import render

    if published:
        output.out().print(f"{job['job_id']} published · {render.checkpoint_line(job)}", soft_wrap=True)
        return
    output.out().print(render.job_view(job))
