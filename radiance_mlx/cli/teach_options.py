"""The options of `update`: which rows, how they are to be read, and what becomes of them."""

from enum import StrEnum
from typing import Annotated

import typer

ROWS, SENDING = "Which rows", "What becomes of them"


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


File = Annotated[
    str | None,
    typer.Argument(
        help="JSONL, JSON, CSV or TSV; - is stdin. Each row is a chat ({messages}, OpenAI's or mlx-lm's), "
        "{input, output}, {prompt, completion}, Alpaca, ShareGPT or {text}.",
        metavar="FILE",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", help="What is asked; goes with one --output.", rich_help_panel=ROWS),
]
Outputs = Annotated[
    list[str] | None, typer.Option("--output", help="The answer to learn for that --input.", rich_help_panel=ROWS)
]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="A data set: hub name, folder or file.", metavar="NAME", show_default=False, rich_help_panel=ROWS
    ),
]
Split = Annotated[str, typer.Option(help="Of the data set; also as train[:100].", rich_help_panel=ROWS)]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        help="What columns hold: input=question,output=answer.",
        metavar="KEY=COLUMN,…",
        show_default=False,
        rich_help_panel=ROWS,
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="The first so many rows.", show_default=False, rich_help_panel=ROWS)
]
WhichAnswers = Annotated[
    Answers | None,
    typer.Option(
        help="What of a chat without weights is learnt. Else last; all for ShareGPT.",
        show_default=False,
        rich_help_panel=ROWS,
    ),
]
Format = Annotated[
    Kind | None,
    typer.Option("--format", help="Of the file. Else what its name says.", show_default=False, rich_help_panel=ROWS),
]
Encoding = Annotated[str, typer.Option(help="Of the file.", rich_help_panel=ROWS)]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave bad rows out; else nothing is sent.", rich_help_panel=ROWS)
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show how rows are understood, and their tokens; send nothing.", rich_help_panel=SENDING
    ),
]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="A label; repeatable.", rich_help_panel=SENDING)]
Key = Annotated[
    str | None,
    typer.Option(
        "--idempotency-key",
        help="Sending the same key again makes no second job.",
        show_default=False,
        rich_help_panel=SENDING,
    ),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait",
        help="Show the training and wait for its end (exit code 4 if it is not published).",
        rich_help_panel=SENDING,
    ),
]
