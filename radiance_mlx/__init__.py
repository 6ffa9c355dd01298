"""radiance_mlx: a local service that keeps learning: LoRA updates in the background, answers all the while.

    from radiance_mlx import Client, AsyncClient

speak to a running service; nothing of the service itself is imported with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import AsyncClient, Client, Retry
    from .errors import RadianceError

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "RadianceError", "Retry", "__version__"]

_FROM = {"AsyncClient": ".client", "Client": ".client", "Retry": ".client", "RadianceError": ".errors"}


def __getattr__(name: str) -> Any:
    """The clients are loaded when they are asked for: the service needs none."""
    if name in _FROM:
        return getattr(import_module(_FROM[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
