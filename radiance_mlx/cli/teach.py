"""`update`: hand in examples to learn from, and wait for the new checkpoint if asked.

What knows rows is imported when rows are there: every command loads this module.
"""

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from . import output
from .options import AsJson, ConfigFile, Home, Token, Url, client_for, examples
from .teach_options import (
    Answers,
    Columns,
    Dataset,
    DryRun,
    Encoding,
    File,
    Format,
    Inputs,
    Key,
    Limit,
    Outputs,
    SkipBad,
    Split,
    Tags,
    Wait,
    WhichAnswers,
)

if TYPE_CHECKING:
    from ..client import Client
    from .parts import Spool

EXAMPLES = examples(
    '% update --input "Where is my key?" --output "Under the mat." --wait',
    "% update examples.jsonl --tag user:alice --tag notes",
    "% update questions.csv --map input=question,output=answer --dry-run",
    "% update --dataset squad --split 'train[:100]' --map input=question,output=answers.text.0",
    "% update examples.jsonl --idempotency-key import-2026-02-09 --json",
    """echo '{"prompt": "Say hi", "completion": "Hi, Ada!"}' | % update -""",
)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog=EXAMPLES)(update)


def update(
    file: File = None,
    inputs: Inputs = None,
    outputs: Outputs = None,
    dataset: Dataset = None,
    split: Split = "train",
    columns: Columns = None,
    limit: Limit = None,
    answers: WhichAnswers = None,
    kind: Format = None,
    encoding: Encoding = "utf-8",
    skip_bad: SkipBad = False,
    dry_run: DryRun = False,
    tag: Tags = None,
    idempotency_key: Key = None,
    wait: Wait = False,
    as_json: AsJson = False,
    url: Url = None,
    home: Home = None,
    config: ConfigFile = None,
    token: Token = None,
) -> int:
    """Teach the service; it trains in the background and answers with the new checkpoint after that.

    Every row is checked before anything is sent.
    """
    from .intakes import intakes_of, summary, take
    from .parts import Spool

    every = None if answers is None else answers is Answers.all
    with ExitStack() as stack:
        stdin_or_file = (file, kind and kind.value, encoding)
        pairs = (inputs or [], outputs or [])
        intakes = intakes_of(stack, stdin_or_file, (dataset, split), pairs, columns or [], every, limit)
        if dry_run:
            from .preview import preview

            connected = partial(client_for, url, home, config, token)
            return preview(intakes, connected, home, config, skip_bad=skip_bad, as_json=as_json)
        spool = stack.enter_context(Spool())
        for intake in intakes:
            take(intake, spool, skip_bad=skip_bad, quiet=as_json)
        tags = [*(t for intake in intakes for t in intake.source.tags), *(tag or [])]
        with client_for(url, home, config, token) as client:
            accepted = _send_all(client, spool, tags, idempotency_key, quiet=as_json or wait)
            ended = [follow_job(client, answer["job_id"], quiet=as_json) for answer in accepted] if wait else []
    if as_json:
        output.print_json(summary(accepted, ended, [row for intake in intakes for row in intake.refused]))
    else:
        for job in ended:
            _show_end(job, job["state"] == "published")
    return output.OK if all(job["state"] == "published" for job in ended) else output.NOT_PUBLISHED


def _send_all(
    client: "Client", spool: "Spool", tags: list[str], key: str | None, *, quiet: bool
) -> list[dict[str, Any]]:
    """The service's answers to all parts; parts are shown as they are accepted, even to who waits for their end."""
    from .parts import send

    answers = []
    for answer in send(client, spool, tags, key):
        answers.append(answer)
        if not quiet:
            _show_queued(answer)
        elif answer["of"] > 1:
            output.remark(f"part {answer['part']} of {answer['of']}: {answer['job_id']}")
    return answers


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
