"""How things look: words, spark lines and tables, made of plain JSON values. Nothing here prints or asks."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .output import printable

BLOCKS = "▁▂▃▄▅▆▇█"
UNDER_WAY = ("training", "evaluating")  # the states of a job whose progress is news
LARGEST = 1e300  # of what a spark line shows; beyond that and NaN are gaps
COLORS = {
    "stable": "green",
    "published": "green",
    "base": "cyan",
    "candidate": "yellow",
    "training": "yellow",
    "evaluating": "yellow",
    "queued": "cyan",
    "risky": "bold red",
    "failed": "bold red",
    "quarantined": "bold red",
    "rejected": "red",
    "rolled_back": "red",
    "rollback": "red",
    "damaged": "bold red",
    "cancelled": "dim",
    "paused": "magenta",
    "review": "magenta",
}


def spark(values: Sequence[float | None], width: int = 40) -> str:
    """The values as a line of blocks, at most `width` wide; a missing value is a blank."""
    points = _resampled(values, width)
    known = [v for v in points if v is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    top = len(BLOCKS) - 1
    levels = [None if v is None else round((v - low) / span * top) if span else top // 2 for v in points]
    return "".join(" " if level is None else BLOCKS[level] for level in levels)


def _resampled(values: Sequence[float | None], width: int) -> list[float | None]:
    """The means of `width` even parts, when there are more values than that."""
    finite = [v if v is not None and abs(v) < LARGEST else None for v in values]
    if len(finite) <= width:
        return finite
    cuts = [round(i * len(finite) / width) for i in range(width + 1)]
    return [_mean(finite[a:b]) for a, b in pairwise(cuts)]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def number(value: Any, digits: int = 3) -> str:
    """A number for people; a dash for none."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def ago(stamp: str | None, now: datetime | None = None) -> str:
    """An ISO time as "3 min ago"; what cannot be read comes back as it is."""
    if not stamp:
        return "–"
    try:
        then = datetime.fromisoformat(stamp.replace("Z", "+00:00"))
        seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    except (ValueError, TypeError):
        return stamp
    if seconds < 5:
        return "just now"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"


def status(word: str | None) -> Text:
    """A state or status in its colour."""
    return Text(printable(word or "–"), style=COLORS.get(word or "", ""))


def checkpoint_line(body: dict[str, Any]) -> str:
    """`checkpoint · status`, as every answer carries them; the base's status is no news."""
    words = [body.get("checkpoint") or "–", body.get("checkpoint_status") or "–"]
    return " · ".join(dict.fromkeys(map(str, words)))


def answer_line(answer: dict[str, Any]) -> str:
    """What stands under an answer: who gave it, how fast, how long."""
    usage = answer.get("usage") or {}
    tokens = f"{usage.get('prompt_tokens', '?')}+{usage.get('completion_tokens', '?')} tokens"
    cached = usage.get("cached_tokens")
    parts = [checkpoint_line(answer), f"{answer.get('latency_ms', '?')} ms", tokens]
    parts += [f"{cached} cached"] if cached else []
    parts += ["cut at max_tokens"] if answer.get("finish_reason") == "length" else []
    return " · ".join(parts)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        right = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if right else "left", no_wrap=column != "notes")
    return table


def _facts(rows: Iterable[tuple[str, Any]]) -> Table:
    """Names and values below each other; a value is text, or something rich that is kept as it is."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        rich = isinstance(value, (Text, Table, Group))
        table.add_row(name, value if rich else Text(printable(str(value))))
    return table


# --- jobs -----------------------------------------------------------------------------------------------


def progress_words(progress: dict[str, Any] | None) -> str:
    """`step 12/60 · loss 0.412 · 3100 tok/s · 4 s left`."""
    if not progress:
        return ""
    words = [f"step {progress.get('step')}/{progress.get('max_steps')}"]
    if progress.get("loss") is not None:
        words.append(f"loss {progress['loss']:.3f}")
    if progress.get("tokens_per_s"):
        words.append(f"{progress['tokens_per_s']:.0f} tok/s")
    if progress.get("eta_s") is not None:
        words.append(f"{progress['eta_s']:.0f} s left")
    return " · ".join(words)


def _remarks(job: dict[str, Any]) -> str:
    words = [] if job.get("kind", "update") == "update" else [str(job["kind"])]
    if job.get("error"):
        return " · ".join([*words, str(job["error"].get("message", ""))])
    under_way = job.get("state") in UNDER_WAY
    said = progress_words(job.get("progress") if under_way else None) or "; ".join(job.get("notes") or [])
    return " · ".join([*words, *([said] if said else [])])


def jobs_table(jobs: list[dict[str, Any]]) -> RenderableType:
    """One row for each job, in the order given."""
    if not jobs:
        return Text("No jobs yet. Teach something: python -m radiance_mlx update --input … --output …")
    table = _table("job", "state", "examples>", "created", "checkpoint", "tags", "notes")
    for job in jobs:
        table.add_row(
            Text(str(job.get("job_id"))),
            status(job.get("state")),
            number(job.get("example_count")),
            ago(job.get("created")),
            Text(str(job.get("checkpoint") or "–")),
            Text(printable(" ".join(job.get("tags") or []))),
            Text(printable(_remarks(job)), style="dim"),
        )
    return table


def job_view(job: dict[str, Any]) -> RenderableType:
    """Everything about one job."""
    rows: list[tuple[str, Any]] = [
        ("job", job.get("job_id")),
        *([] if job.get("kind", "update") == "update" else [("kind", str(job["kind"]))]),
        ("state", status(job.get("state"))),
        ("created", f"{job.get('created')} ({ago(job.get('created'))})"),
        ("updated", f"{job.get('updated')} ({ago(job.get('updated'))})"),
        ("examples", number(job.get("example_count"))),
        ("attempts", number(job.get("attempts"))),
        ("checkpoint", job.get("checkpoint") or "–"),
    ]
    rows += [("tags", " ".join(job["tags"]))] if job.get("tags") else []
    rows += (
        [("progress", progress_words(job["progress"]))] if job.get("progress") and job.get("state") in UNDER_WAY else []
    )
    rows += [("note", note) for note in job.get("notes") or []]
    if job.get("error"):
        rows.append(("error", Text(printable(job["error"].get("message", "")), style="red")))
        rows += [("hint", job["error"]["hint"])] if job["error"].get("hint") else []
    return _facts(rows)


# --- checkpoints ----------------------------------------------------------------------------------------


def checkpoints_table(checkpoints: list[dict[str, Any]], current: str | None) -> RenderableType:
    """The lineage, oldest first; an arrow marks the one that answers now."""
    if not checkpoints:
        return Text("No checkpoints yet: the base model answers.")
    table = _table("", "checkpoint", "status", "parent", "created", "jobs>", "loss>", "forgetting>", "notes")
    for ckpt in checkpoints:
        metrics = ckpt.get("metrics") or {}
        here = ckpt.get("checkpoint") == current
        table.add_row(
            Text("→" if here else "", style="bold green"),
            Text(str(ckpt.get("checkpoint")), style="bold" if here else ""),
            status(ckpt.get("status")),
            Text(str(ckpt.get("parent") or "base")),
            ago(ckpt.get("created")),
            str(len(ckpt.get("jobs") or [])),
            number(metrics.get("finetune_loss")),
            number(metrics.get("forgetting_loss")),
            Text(printable(_checkpoint_remarks(ckpt)), style="dim"),
        )
    return table


def events_table(events: list[dict[str, Any]]) -> RenderableType:
    """One row for each event, in the order given: when, what, to what, why."""
    if not events:
        return Text("Nothing has happened yet.")
    table = _table("when", "event", "what", "notes")
    for event in events:
        data = event.get("data") or {}
        table.add_row(
            ago(event.get("at")),
            status(event.get("kind")),
            Text(printable(_subject(data))),
            Text(printable(event.get("reason") or ""), style="dim"),
        )
    return table


def _subject(data: dict[str, Any]) -> str:
    """A move as `from → to`, a checkpoint with the number of its jobs, or jobs: one by name, several by number."""
    if "from" in data:
        names = (str(data.get(end) or "base") for end in ("from", "to"))
        return " → ".join(name[:12] if len(name) == 64 else name for name in names)  # a base's name is its hash
    jobs = data.get("jobs") or []
    named = [data["checkpoint"]] if data.get("checkpoint") else jobs if len(jobs) == 1 else []
    return " · ".join([*named, *([f"{len(jobs)} jobs"] if len(jobs) > 1 else [])])


def _checkpoint_remarks(ckpt: dict[str, Any]) -> str:
    words = [f"damaged: {ckpt['damaged']}"] if ckpt.get("damaged") else []
    words += ["files removed"] if ckpt.get("pruned") else []
    notes = ckpt.get("notes") or []
    return "; ".join([*words, *([notes] if isinstance(notes, str) else notes)])


def checkpoint_view(ckpt: dict[str, Any]) -> RenderableType:
    """Everything about one checkpoint."""
    rows: list[tuple[str, Any]] = [
        ("checkpoint", str(ckpt.get("checkpoint")) + (" (answers now)" if ckpt.get("current") else "")),
        ("status", status(ckpt.get("status"))),
        ("parent", ckpt.get("parent") or "base"),
        ("created", f"{ckpt.get('created')} ({ago(ckpt.get('created'))})"),
        ("jobs", " ".join(ckpt.get("jobs") or []) or "–"),
        ("data", ckpt.get("data_hash") or "–"),
    ]
    metrics = {k: v for k, v in (ckpt.get("metrics") or {}).items() if isinstance(v, (int, float))}
    rows += [(name, number(value, 4)) for name, value in metrics.items()]
    remarks = _checkpoint_remarks(ckpt)
    return _facts([*rows, *([("notes", remarks)] if remarks else [])])


# --- info -----------------------------------------------------------------------------------------------


def _curve(values: Sequence[float | None]) -> Text:
    known = [v for v in values if v is not None]
    if not known:
        return Text("–")
    ends = number(known[-1]) if len(known) == 1 else f"{number(known[0])} → {number(known[-1])}"
    return Text.assemble((spark(values), "green"), f"  {ends}")


def _queue_words(info: dict[str, Any]) -> str:
    counts = info.get("jobs") or {}
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{info.get('queue_depth', 0)} waiting" + (f" ({states})" if states else "")


def info_view(info: dict[str, Any]) -> RenderableType:
    """The state of the service on one screen."""
    hardware, training = info.get("hardware") or {}, info.get("training")
    ready = Text("ready", style="green") if info.get("ready") else Text("not ready", style="bold yellow")
    current = Text(f"{info.get('current_checkpoint')}  ", style="bold") + status(info.get("checkpoint_status"))
    rows: list[tuple[str, Any]] = [
        ("service", ready + Text(f"  radiance_mlx {info.get('version')}", style="dim")),
        ("base model", info.get("base_model")),
        ("checkpoint", current),
        ("hardware", f"{hardware.get('device')}, {hardware.get('backend')}"),
        ("home", info.get("home")),
        ("updates", f"{info.get('update_mode')}, last {ago(info.get('last_update'))}"),
        ("queue", _queue_words(info)),
    ]
    if training:
        words = progress_words(training.get("progress"))
        rows.append(("training", Text(f"{training.get('checkpoint')}  {words}", style="yellow")))
    rows += [(name.replace("_", " "), _curve(c)) for name, c in (info.get("loss_curves") or {}).items() if c]
    summary = info.get("forgetting_summary")
    if summary:
        retention, delta = number(summary.get("retention_score")), number(summary.get("anchor_ce_delta"))
        rows.append(("forgetting", f"retention {retention}, anchors' cross-entropy {delta} above the base"))
    rows += [("warning", Text(printable(w), style="yellow")) for w in info.get("warnings") or []]
    return _facts(rows)


# --- evaluation -----------------------------------------------------------------------------------------

_EVAL_COLUMNS = (
    ("retention", "retention_score", "exp(-KL) from the base; 1: nothing forgotten"),
    ("forgetting", "forgetting_kl", "KL(base ‖ this)"),
    ("step", "forgetting_loss_delta", "how much of that came since"),
    ("drift", "drift_kl", "KL(that one ‖ this)"),
    ("CE delta", "anchor_ce_delta", "anchors' own tokens, above the base"),
    ("agreement", "base_agreement", "share of tokens where the base would say the same"),
)


def eval_view(results: list[dict[str, Any]]) -> RenderableType:
    """One checkpoint with its 95% intervals, or a line of means for each of several; nats a token."""
    if len(results) == 1:
        return _eval_facts(results[0])
    table = _table("checkpoint", "against", *(f"{title}>" for title, _, _ in _EVAL_COLUMNS))
    for result in results:
        values = [number(result.get(name)) for _, name, _ in _EVAL_COLUMNS]
        table.add_row(printable(str(result.get("checkpoint"))), str(result.get("against")), *values)
    return table


def _eval_facts(result: dict[str, Any]) -> RenderableType:
    intervals = result.get("intervals") or {}
    rows = [("checkpoint", str(result.get("checkpoint"))), ("against", str(result.get("against")))]
    for title, name, meaning in _EVAL_COLUMNS:
        low, high = intervals.get(name) or (None, None)
        words = f"{number(result.get(name))}  ({number(low)} to {number(high)})  {meaning}"
        rows.append((title, words))
    return _facts(rows)


def anchors_words(anchors: dict[str, Any]) -> str:
    """Which anchors, in a line."""
    skipped = f", {anchors['skipped']} skipped" if anchors.get("skipped") else ""
    count = f"{anchors.get('documents')} anchors, {anchors.get('tokens')} tokens{skipped}"
    return (
        f"{count} from {anchors.get('source')} in {number(anchors.get('seconds'), 1)} s · nats a token, 95% intervals"
    )
