"""The options that many commands share, and how they become a client."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..client import Client

PANEL = "Which service"

Url = Annotated[
    str | None,
    typer.Option(
        help="Address of the service. Else RADIANCE_URL, what runs on the home, the configured address.",
        metavar="URL",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Home = Annotated[
    Path | None,
    typer.Option(
        help="Home folder of the service. Else RADIANCE_HOME, or the folder of the configuration.",
        metavar="FOLDER",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Configuration file. Else config.yaml in the home, or here.",
        metavar="FILE",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        help="Bearer token. Else RADIANCE_SERVER__TOKEN, or server.token of the configuration.",
        metavar="TEXT",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
AdapterPath = Annotated[
    Path | None,
    typer.Option(help="Any LoRA adapter folder that mlx-lm reads.", metavar="FOLDER", show_default=False),
]
BaseModel = Annotated[
    str | None, typer.Option(help="Base model to load here, else the configured one.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine output: JSON on stdout, nothing else there.")]


def client_for(url: str | None, home: Path | None, config: Path | None, token: str | None) -> "Client":
    """The client that these options mean."""
    from ..client import Client, Retry

    # somebody waits at the terminal: that no service is there is said at once; one that goes away is waited for
    return Client(url, token, home=home, config_file=config, retry=Retry(absent=False))


def examples(*commands: str) -> str:
    """The closing part of a command's help: lines to copy; `%` stands for the program."""
    lines = (_escaped(command).replace("%", "python -m radiance_mlx") for command in commands)
    return "\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in lines)])


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
