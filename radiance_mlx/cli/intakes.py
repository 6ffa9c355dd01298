"""What `update` takes in: intakes of its sources, their good rows into a spool, and what is said of them."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from ..rows import SHAPES
from ..rows.columns import parse_map
from ..rows.intake import Intake, Refused, Taken
from . import output
from .parts import Spool
from .sources import SHOWN_FAULTS, bad_rows, source_of_dataset, source_of_file, source_of_pairs, told_as_bad_input


def intakes_of(
    stack: ExitStack,
    file: tuple[str | None, str | None, str],
    dataset: tuple[str | None, str],
    pairs: tuple[Sequence[str], Sequence[str]],
    columns: Sequence[str],
    every_answer: bool | None,
    limit: int | None,
) -> list[Intake]:
    """Of `file` (name, format, encoding), `dataset` (name, split) and `pairs` (inputs, outputs), where they are given.

    Raises `InvalidRequest`, also if none is given.
    """
    mapped = parse_map(columns)
    sources = [source_of_file(stack, file[0], *file[1:])] if file[0] else []
    sources += [source_of_dataset(dataset[0], dataset[1])] if dataset[0] else []
    typed = [source_of_pairs(*pairs)] if any(pairs) else []
    if not sources and not typed:
        raise output.BadInput(
            "There is nothing to learn.", "Give a FILE, - for stdin, a --dataset, or pairs of --input and --output."
        )
    found = [Intake(source, mapped, every_answer=every_answer, limit=limit) for source in sources]
    return found + [Intake(source) for source in typed]


def take(intake: Intake, spool: Spool, *, skip_bad: bool, quiet: bool) -> None:
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


def summary(answers: list[dict[str, Any]], ended: list[dict[str, Any]], refused: Sequence[Refused]) -> dict[str, Any]:
    """One update as the service answers it, or its job that has ended; of several the last one's, and all their jobs.

    Rows that were skipped are told.
    """
    skipped = {"skipped": [{"place": one.place, "problem": one.problem} for one in refused]} if refused else {}
    last = {key: value for key, value in answers[-1].items() if key not in ("part", "of")}
    if len(answers) == 1:
        return {**(ended[0] if ended else {k: v for k, v in last.items() if k != "examples"}), **skipped}
    jobs = ended or [{key: answer[key] for key in ("job_id", "queued", "examples")} for answer in answers]
    examples = sum(answer["examples"] for answer in answers)
    return {**last, "examples": examples, "parts": len(answers), "jobs": jobs, **skipped}
