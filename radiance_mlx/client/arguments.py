"""What is handed to the clients and their methods, looked at before anything is sent: each fault names its argument."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import ConfigError, InvalidRequest

LONGEST_SHOWN = 60
ROWS = "a list of rows, like [{'input': …, 'output': …}]"
TEXT = "text"


def wrong(name: str, given: object, takes: str) -> InvalidRequest:
    """The error for an argument that cannot be used."""
    return InvalidRequest(f"The request cannot be sent: {name} is {_shown(given)}.", f"{name} takes {takes}.")


def unfit(name: str, given: object, takes: str) -> ConfigError:
    """The error for what a client cannot be made with."""
    return ConfigError(f"{name} cannot be {_shown(given)}.", f"{name} takes {takes}.")


def _shown(given: object) -> str:
    shown = repr(given)
    return f"{shown[:LONGEST_SHOWN]}…" if len(shown) > LONGEST_SHOWN else shown


def text(name: str, given: object) -> str:
    """`given`. Raises `InvalidRequest` if it is something else than text."""
    if not isinstance(given, str):
        raise wrong(name, given, TEXT)
    return given


def listed(name: str, given: object, takes: str) -> list[Any]:
    """What is in `given`; a text, whose characters it would be, is no list. Raises `InvalidRequest`."""
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise wrong(name, given, takes)
    return list(given)


def mappings(name: str, given: object, takes: str) -> list[dict[str, Any]]:
    """`given` as plain objects. Raises `InvalidRequest`, for one that is none by its place."""
    rows = listed(name, given, takes)
    for place, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise wrong(f"{name}[{place}]", row, "a mapping")
    return [dict(row) for row in rows]


def seconds(name: str, given: object, also: str) -> float:
    """A number. Raises `InvalidRequest` for anything else; `also` is what the argument takes beside numbers."""
    if not is_number(given):
        raise wrong(name, given, f"{also} or a number of seconds")
    return float(given)


def is_number(given: object) -> TypeGuard[float]:
    """Whether it is one, infinity among them."""
    return isinstance(given, Real) and not isinstance(given, bool) and not math.isnan(given)


def path(name: str, given: str | Path | None) -> Path | None:
    """`given` as a path. Raises `ConfigError` if it is none."""
    if given is None or isinstance(given, Path):
        return given
    if not isinstance(given, str) or not given:
        raise unfit(name, given, "a path, or None")
    return Path(given)


def called(name: str, given: object) -> None:
    """Raises `InvalidRequest` unless it is None, or can be called."""
    if given is not None and not callable(given):
        raise wrong(name, given, "a function, or None")
