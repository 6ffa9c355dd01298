"""`fuse`: a checkpoint and its base as one model, for programs that know nothing of adapters."""

from pathlib import Path
from typing import Annotated

import typer

from ..messages import STABLE
from . import output
from .options import AdapterPath, AsJson, BaseModel, ConfigFile, Home, examples


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        epilog=examples(
            "% fuse --out ./my-model",
            "% fuse A_2026-02-09_0012 --out ./my-model",
            "% fuse --adapter-path ./any-mlx-lm-adapter --out ./my-model --base-model mlx-community/Qwen3-4B-4bit",
        )
    )(fuse)


def fuse(
    out: Annotated[Path, typer.Option(help="The new folder to write.", metavar="FOLDER", show_default=False)],
    checkpoint: Annotated[
        str | None, typer.Argument(help="An id, or stable. Else stable.", metavar="[ID]", show_default=False)
    ] = None,
    adapter_path: AdapterPath = None,
    base_model: BaseModel = None,
    as_json: AsJson = False,
    home: Home = None,
    config: ConfigFile = None,
) -> None:
    """Fold a checkpoint into its base model: a folder that mlx-lm loads on its own.

    Loads the base model here, beside a service that may run. What the adapter changes is kept in full precision, also
    of a quantised base; where half precision rounds away too much of that, a warning says so.
    """
    if adapter_path is not None and checkpoint is not None:
        raise output.BadInput("--adapter-path and a checkpoint exclude each other.", "Fuse one after the other.")
    from .. import offline
    from ..config import load_config

    flags = {"base_model": base_model} if base_model else {}
    loaded = load_config(config_file=config, home=home, flags=flags)
    output.remark(f"loading {loaded.config.base_model} …")
    found = offline.fuse(loaded, checkpoint or STABLE, adapter_path, out)
    _warn_of_loss(found["rounding_lost"])
    if as_json:
        output.print_json(found)
        return
    output.out().print(f"{found['out']}: {found['base_model']} with {found['adapter']} in {found['modules']} modules")
    output.remark(f'try it: python -m mlx_lm generate --model {found["out"]} --prompt "…"')


def _warn_of_loss(share: float) -> None:
    """Where a service would not fold (`serving.fuse`), the model is written all the same."""
    from ..engine.fusing import LOSS

    if share > LOSS:
        output.warn(
            f"the weights of this base have too few digits for what was learnt: {share:.0%} of it is lost by rounding",
            "The model may say less of it than base and adapter do. Serve those side by side instead: mlx_lm takes "
            "--model and --adapter-path, and a service answers from both.",
        )
