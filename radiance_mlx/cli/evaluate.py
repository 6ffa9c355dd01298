"""`eval`: what checkpoints have forgotten, measured on anchors; by the running service, or here without one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ServiceUnreachable
from ..messages import STABLE
from . import output
from .options import AdapterPath, AsJson, BaseModel, ConfigFile, Home, Token, Url, client_for, examples

if TYPE_CHECKING:
    from rich.progress import Progress


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "eval",
        epilog=examples(
            "% eval",
            "% eval --anchor-provider hf --anchor-dataset tnn1t1s/news-100-sept-2023",
            "% eval --checkpoint all --json",
            "% eval --checkpoint A_2026-02-09_0012 --against A_2026-02-09_0007",
            "% eval --adapter-path ./my-adapter --base-model mlx-community/Qwen3-4B-4bit",
        ),
    )(evaluate)


def evaluate(
    checkpoint: Annotated[
        str | None,
        typer.Option(help="An id, base, all, or stable, which is the default.", metavar="ID", show_default=False),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Instead of the parent: an id, stable, or base.", metavar="ID", show_default=False),
    ] = None,
    adapter_path: AdapterPath = None,
    anchor_provider: Annotated[
        Literal["hf", "local"] | None, typer.Option(help="Where the anchors come from.", show_default=False)
    ] = None,
    anchor_dataset: Annotated[
        str | None,
        typer.Option(help="Hub name, or a file or folder here (for hf).", metavar="NAME", show_default=False),
    ] = None,
    anchor_split: Annotated[str | None, typer.Option(help="Split of the data set.", show_default=False)] = None,
    anchor_sample: Annotated[int | None, typer.Option(min=1, help="At most so many.", show_default=False)] = None,
    anchor_column: Annotated[
        list[str] | None, typer.Option(help="Column to read; twice for prompt and answer.", show_default=False)
    ] = None,
    base_model: BaseModel = None,
    as_json: AsJson = False,
    url: Url = None,
    home: Home = None,
    config: ConfigFile = None,
    token: Token = None,
) -> None:
    """Measure what checkpoints have forgotten, on anchors: divergence from the base and from the parent.

    Asks the running service; without one, or for files of this machine, loads the base model here.
    """
    if adapter_path is not None and checkpoint is not None:
        raise output.BadInput("--adapter-path and --checkpoint exclude each other.", "Measure one after the other.")
    here = adapter_path is not None or base_model is not None or _is_local(anchor_dataset)
    if url is not None and here:
        raise output.BadInput(
            "--url asks a service, which takes no --adapter-path, --base-model or files of this machine.",
            "Leave --url out to measure here, with --home for the checkpoints' home.",
        )
    anchors = {
        "provider": anchor_provider or ("hf" if anchor_dataset else None),
        "dataset": anchor_dataset,
        "split": anchor_split,
        "sample": anchor_sample,
        "columns": tuple(anchor_column) if anchor_column else None,
    }
    asked = {name: value for name, value in anchors.items() if value is not None}
    with _Bar(as_json) as bar:
        found = None
        if not here:
            found = _by_the_service(checkpoint, against, asked, bar, (url, home, config, token))
        if found is None:
            found = _here(checkpoint, against, adapter_path, asked, base_model, bar, home, config)
    if as_json:
        output.print_json(found)
        return
    from . import render

    output.out().print(render.eval_view(found["results"]))
    output.remark(render.anchors_words(found["anchors"]))


def _is_local(dataset: str | None) -> bool:
    return dataset is not None and (dataset.startswith(("/", ".", "~")) or Path(dataset).exists())


def _by_the_service(
    checkpoint: str | None, against: str | None, anchors: dict[str, Any], bar: "_Bar", where: tuple[Any, ...]
) -> dict[str, Any] | None:
    """What the running service measures; None when none runs, unless it was named."""
    url, home, config, token = where
    fields = {f"anchor_{name}": list(value) if name == "columns" else value for name, value in anchors.items()}
    wanted = None if checkpoint == "all" else [checkpoint or STABLE]
    with client_for(url, home, config, token) as client:
        if url is None and not client.is_ready():
            return None
        try:
            return client.evaluate(wanted, against, bar.show, **fields).raw
        except ServiceUnreachable:
            if url is not None:
                raise
            return None


def _here(
    checkpoint: str | None,
    against: str | None,
    adapter_path: Path | None,
    anchors: dict[str, Any],
    base_model: str | None,
    bar: "_Bar",
    home: Path | None,
    config: Path | None,
) -> dict[str, Any]:
    from .. import offline
    from ..config import load_config

    flags = {"base_model": base_model} if base_model else {}
    loaded = load_config(config_file=config, home=home, flags=flags)
    names = None if checkpoint == "all" else [checkpoint or STABLE]
    _log_warnings_only()
    output.remark(f"no service is asked: loading {loaded.config.base_model} here …")
    return offline.evaluate(loaded, names, against, adapter_path, anchors, bar.show)


def _log_warnings_only() -> None:
    """On stderr: stdout is the result's."""
    import logging
    import sys

    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


class _Bar:
    """How many checkpoints are measured, on stderr; nothing for programs."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._progress: Progress | None = None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, done: int, of: int) -> None:
        """Called as the work goes on."""
        if self._quiet:
            return
        if self._progress is None:
            from .progress import counting_bar

            self._progress = counting_bar(output.err())
            self._task = self._progress.add_task("measuring", total=of)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=of)
