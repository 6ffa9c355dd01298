"""`info`, `jobs`, `checkpoints`, `rollback`, `events`: look at the running service, and steer it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import NotFound
from . import output, teach
from .options import AsJson, ConfigFile, Home, Token, Url, client_for, examples

if TYPE_CHECKING:
    from ..client import Client


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(epilog=examples("% info", "% info --json | jq .loss_curves"))(info)
    app.command(
        epilog=examples(
            "% jobs --state failed",
            "% jobs job_000128",
            "% jobs job_000128 --wait",
            "% jobs cancel job_000128",
        )
    )(jobs)
    app.command(epilog=examples("% checkpoints", "% checkpoints A_2026-02-09_0012 --json"))(checkpoints)
    app.command(epilog=examples("% rollback", "% rollback A_2026-02-09_0011 --reason 'too chatty'", "% rollback base"))(
        rollback
    )
    app.command(epilog=examples("% events", "% events --kind rollback", "% events --json | jq '.events[].reason'"))(
        events
    )


def info(
    as_json: AsJson = False,
    url: Url = None,
    home: Home = None,
    config: ConfigFile = None,
    token: Token = None,
) -> None:
    """Show the model, the checkpoint, the queue, the training in progress and the loss curves."""
    with client_for(url, home, config, token) as client:
        facts = client.info().raw
    if as_json:
        output.print_json(facts)
        return
    from . import render

    output.out().print(render.info_view(facts))


def jobs(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="Nothing: list the jobs. ID: show one. cancel ID: cancel it.",
            metavar="ID | cancel ID",
            show_default=False,
        ),
    ] = None,
    cancel: Annotated[str | None, typer.Option(metavar="ID", help="Cancel this job.", show_default=False)] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job ID to its end.")] = False,
    state: Annotated[str | None, typer.Option(help="List jobs in this state only.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, help="List at most so many.")] = 20,
    as_json: AsJson = False,
    url: Url = None,
    home: Home = None,
    config: ConfigFile = None,
    token: Token = None,
) -> int:
    """List the update jobs, newest first; show, follow or cancel one."""
    job_id, cancelling = which_job(words or [], cancel)
    if wait and (job_id is None or cancelling):
        raise output.BadInput("--wait needs the id of one job.", "Like this: jobs job_000128 --wait")
    with client_for(url, home, config, token) as client:
        if job_id is None:
            _list_jobs(client, state, limit, as_json)
        elif wait:
            return teach.follow_to_the_end(client, job_id, as_json)
        else:
            _one_job(client, (client.cancel(job_id) if cancelling else client.job(job_id)).raw, as_json)
    return output.OK


def which_job(words: list[str], cancel: str | None) -> tuple[str | None, bool]:
    """The job meant by `[ID | cancel ID]` and `--cancel ID`, and whether to cancel it."""
    if cancel and not words:
        return cancel, True
    match words:
        case []:
            return None, False
        case ["cancel", job_id] if not cancel:
            return job_id, True
        case [job_id] if job_id != "cancel" and not cancel:
            return job_id, False
    raise output.BadInput("Name one job.", "Like this: jobs job_000128, or: jobs cancel job_000128")


def _list_jobs(client: "Client", state: str | None, limit: int, as_json: bool) -> None:
    page = client.jobs(state=state, limit=limit).raw
    if as_json:
        output.print_json(page)
        return
    from . import render

    output.out().print(render.jobs_table(page["jobs"]))
    more = f" · older jobs: jobs --limit {limit * 2}" if page.get("next") else ""
    output.remark(f"serving {render.checkpoint_line(page)}{more}")


def _one_job(client: "Client", job: dict[str, Any], as_json: bool) -> None:
    """A job with the status of its own checkpoint; `serving` says who answers meanwhile."""
    job = {**job, "checkpoint_status": _status(client, job.get("checkpoint"))}
    if as_json:
        output.print_json(job)
        return
    from . import render

    output.out().print(render.job_view(job))
    output.remark(f"serving {render.checkpoint_line(job['serving'])}")


def _status(client: "Client", checkpoint: str | None) -> str | None:
    """The status of a checkpoint; None when there is none, or not yet."""
    try:
        return client.checkpoint(checkpoint).status if checkpoint else None
    except NotFound:
        return None


def checkpoints(
    checkpoint_id: Annotated[
        str | None, typer.Argument(help="Show this one only.", metavar="ID", show_default=False)
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    home: Home = None,
    config: ConfigFile = None,
    token: Token = None,
) -> None:
    """List the lineage, oldest first, or show one checkpoint."""
    with client_for(url, home, config, token) as client:
        if checkpoint_id:
            found = client.checkpoint(checkpoint_id)
            body = {**found.raw, "checkpoint_status": found.status}
        else:
            body = client.checkpoints().raw
    if as_json:
        output.print_json(body)
        return
    from . import render

    if checkpoint_id:
        output.out().print(render.checkpoint_view(body))
        output.remark(f"serving {render.checkpoint_line(body['serving'])}")
        return
    output.out().print(render.checkpoints_table(body["checkpoints"], body.get("current")))
    output.remark(f"serving {render.checkpoint_line(body)}")


def rollback(
    to: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint, or base; without it, the parent of the current one.",
            metavar="ID | base",
            show_default=False,
        ),
    ] = None,
    reason: Annotated[str, typer.Option(help="Kept with the lineage.", show_default=False)] = "",
    as_json: AsJson = False,
    url: Url = None,
    home: Home = None,
    config: ConfigFile = None,
    token: Token = None,
) -> None:
    """Serve an older checkpoint from now on; nothing is deleted."""
    with client_for(url, home, config, token) as client:
        done = client.rollback(to, reason).raw
    if as_json:
        output.print_json(done)
        return
    from . import render

    output.out().print(f"serving {render.checkpoint_line(done)}, before: {done.get('previous')}", soft_wrap=True)


def events(
    kind: Annotated[
        str | None,
        typer.Option(
            help="Only these: published, rejected, rollback, failed, progress and others.", show_default=False
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="List at most so many.")] = 20,
    before: Annotated[
        int | None,
        typer.Option(metavar="ID", min=1, help="Only what came before this event.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    home: Home = None,
    config: ConfigFile = None,
    token: Token = None,
) -> None:
    """List what happened, newest first: what was published, refused or rolled back, when and why."""
    with client_for(url, home, config, token) as client:
        page = client.events(kind, limit, before).raw
    if as_json:
        output.print_json(page)
        return
    from . import render

    output.out().print(render.events_table(page["events"]))
    of_kind = f" --kind {kind}" if kind else ""
    more = f" · older events: events{of_kind} --before {page['next']}" if page.get("next") else ""
    output.remark(f"serving {render.checkpoint_line(page)}{more}")
