"""A job's training as a bar: step, loss, speed and the time that is left."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ..client import Client, Job


@dataclass
class Followed:
    """A job that has ended, and the losses that were seen on the way."""

    job: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def note(self, job: dict[str, Any]) -> None:
        """Remember the loss of a job in training, once for each step."""
        loss = (job.get("progress") or {}).get("loss")
        if loss is not None and (not self.losses or self.losses[-1] != loss):
            self.losses.append(loss)


def follow(client: "Client", job_id: str, *, quiet: bool = False, console: "Console | None" = None) -> Followed:
    """Wait for the job's end; unless `quiet`, a bar shows the way (on stderr if no console is given)."""
    followed = Followed()
    if quiet:
        followed.job = client.wait(job_id, lambda job: followed.note(job.raw)).raw
        return followed
    with _bar(console or output.err()) as bar:
        task = bar.add_task(job_id, total=None, words="")

        def show(job: "Job") -> None:
            followed.note(job.raw)
            bar.update(task, **bar_facts(job.raw))

        followed.job = client.wait(job_id, show).raw
        bar.update(task, description=str(followed.job.get("state")), words="")
        if followed.job.get("state") == "published":  # any other end leaves the bar where it was
            done = bar.tasks[task].total or 1
            bar.update(task, total=done, completed=done)
    return followed


def bar_facts(job: dict[str, Any]) -> dict[str, Any]:
    """What the bar shows for a job: no total while it waits, steps while it trains."""
    progress = job.get("progress") or {}
    state = progress.get("phase") or job.get("state")
    if not progress.get("max_steps"):
        return {"total": None, "completed": 0, "description": state, "words": ""}
    return {
        "total": progress["max_steps"],
        "completed": progress.get("step", 0),
        "description": state,
        "words": _words(progress),
    }


def _words(progress: dict[str, Any]) -> str:
    from .render import progress_words

    return progress_words(progress).partition(" · ")[2]


def _bar(console: "Console") -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    return Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}", style="dim", markup=False),
        console=console,
        refresh_per_second=8,
    )


def counting_bar(console: "Console") -> "Progress":
    """A bar for things that are done one after another; not started yet."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
