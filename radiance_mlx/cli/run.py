"""`run`: start the service in the foreground and say where it listens."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ConfigError
from . import output
from .options import examples

if TYPE_CHECKING:
    from ..config import Config

Announce = Callable[[str, dict[str, Any]], None]

EXAMPLES = examples(
    "% run",
    "% run --base-model mistral-7b-instruct --update-mode batched --batch-max-examples 128",
    "% run --home ~/radiance --port 8400 --set training.lr=1e-4 --set lora.r=16",
)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog=EXAMPLES)(run)


def run(
    backend: Annotated[
        Literal["auto", "metal", "mps", "cuda", "cpu"] | None,
        typer.Option(help="Where to compute; mps is another name for metal.", show_default=False),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="nano, a short name, a folder, or a hub name (mlx-community/…).", show_default=False),
    ] = None,
    update_mode: Annotated[
        Literal["immediate", "batched"] | None,
        typer.Option(help="Train on each update, or gather a batch first.", show_default=False),
    ] = None,
    batch_max_examples: Annotated[
        int | None, typer.Option(help="A batch trains when it holds so many examples,", show_default=False)
    ] = None,
    batch_max_age_min: Annotated[
        float | None, typer.Option(help="or when its oldest is so many minutes old.", show_default=False)
    ] = None,
    preset: Annotated[
        Literal["none", "lasting"] | None,
        typer.Option(help="lasting: what keeps earlier lessons best; costs training time.", show_default=False),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration file.", metavar="FILE", show_default=False)] = None,
    home: Annotated[
        Path | None,
        typer.Option(help="Folder for adapters, data, metrics and state.", metavar="FOLDER", show_default=False),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.", show_default=False)] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option(help="How much the log says.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of config.yaml; the value is YAML. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON on stdout for each announcement.")] = False,
) -> int:
    """Start the service here; Ctrl-C stops it.

    What is not given comes from the environment (RADIANCE_…), config.yaml, the base model's own
    recommendation, or the default.
    """
    from ..config import load_config

    named = {
        "backend": backend,
        "preset": preset,
        "base_model": base_model,
        "update_mode": update_mode,
        "batch.max_examples": batch_max_examples,
        "batch.max_age_minutes": batch_max_age_min,
        "server.host": host,
        "server.port": port,
        "server.log_level": log_level,
    }
    flags = {**parse_settings(settings or []), **{k: v for k, v in named.items() if v is not None}}
    loaded = load_config(config_file=config, home=home, flags=flags)
    if loaded.config.training.distributed != "off":
        _connect(loaded.config)
        if _is_worker():
            return _work(loaded.config)
    from ..api.server import serve

    secured = loaded.config.server.token is not None
    return serve(loaded, announcer(as_json, secured))


def _is_worker() -> bool:
    """Whether this process was started as another rank than the first, which is the service."""
    return os.environ.get("MLX_RANK", "0") != "0"


def _connect(config: "Config") -> None:
    """Wait for the other ranks; before the base is loaded, which may take longer here than there."""
    from ..lora.ranks import connect

    assert config.training.distributed != "off"
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    typer.echo("waiting for the other machines …", err=True)
    connect(config.training.distributed)
    for number, handler in before.items():
        signal.signal(number, handler)


def _work(config: "Config") -> int:
    from ..engine.worker import work

    for number in (signal.SIGINT, signal.SIGTERM):  # it waits within MLX, where Python's handlers are not called
        signal.signal(number, signal.SIG_DFL)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    work(config)
    return output.OK


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["lora.r=16"]` as `{"lora.r": 16}`; values are YAML."""
    import yaml

    from ..config.loading import NOT_YAML

    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {setting!r} is not KEY=VALUE.", "Like this: --set training.lr=1e-4")
        try:
            parsed[key.strip()] = yaml.safe_load(text)
        except NOT_YAML as error:
            raise ConfigError(f"The value of --set {setting!r} is not YAML.", str(error)) from error
    return parsed


def announcer(as_json: bool, secured: bool) -> Announce:
    """What `serve` calls: tells people (stderr) or programs (stdout)."""
    url = ""

    def announce(event: str, facts: dict[str, Any]) -> None:
        nonlocal url
        url = str(facts.get("url", url))
        # whoever read the announcements has left; serve on
        with contextlib.suppress(BrokenPipeError, output.CannotWrite):
            if as_json:
                output.print_json({"event": event, **facts})
            else:
                _tell(event, facts, url, secured)

    return announce


def _tell(event: str, facts: dict[str, Any], url: str, secured: bool) -> None:
    from rich.text import Text

    console = output.err()
    if event == "warning":
        message = output.printable(str(facts.get("message")))
        console.print(Text.assemble(("warning: ", "bold yellow"), message), soft_wrap=True)
    elif event == "listening":
        head = Text.assemble(("radiance_mlx", "bold"), " listens on ", (url, "bold cyan"))
        console.print(head, soft_wrap=True)
        output.remark(f"  home {facts.get('home')} · pid {facts.get('pid')}")
        output.remark(f"  loading {facts.get('base_model')} …")
    elif event == "ready":
        _tell_ready(facts, url, secured)


def _tell_ready(facts: dict[str, Any], url: str, secured: bool) -> None:
    from rich.text import Text

    model = Text.assemble(("ready", "bold green"), f" in {facts.get('seconds', 0):.1f} s: ")
    model.append(str(facts.get("base_model")), "bold")
    model.append(f" · checkpoint {facts.get('checkpoint')} ({facts.get('checkpoint_status')})")
    model.append(f" · {facts.get('backend')}, {facts.get('device')}")
    output.err().print(model, soft_wrap=True)
    secret = '-H "Authorization: Bearer $RADIANCE_SERVER__TOKEN" ' if secured else ""
    body = """-H 'content-type: application/json' -d '{"prompt": "Who are you?"}'"""
    output.remark(f"  try   curl -s {url}/search {secret}{body}")
    output.remark("  stop  Ctrl-C")
