"""Keys that an object of a JSON body has more than once, of which all but the last would be lost in silence.

What reads bodies does not tell them (pydantic's parser takes the last), so sound bodies are looked through once more:
that is one pass in C, which keeps nothing, and only a body that has such keys is read again to say where.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

Place = tuple[str | int, ...]
LONGEST_KEY = 100  # characters of one that is told


class _Repeated(Exception):
    """There is one."""


def repeated_keys(body: bytes) -> list[Place]:
    """The place of each key that comes again within its object; `body` is JSON in UTF-8. Raises `ValueError`."""
    text = body.decode()
    try:
        _read(text, _require_once)
    except _Repeated:
        return list(_places(_read(text, _with_repeated), ()))
    return []


def _read(text: str, hook: Any) -> Any:
    try:
        return json.loads(text, object_pairs_hook=hook, strict=False)
    except ValueError:  # numbers of thousands of digits are refused, unless they are floats; those take longer
        return json.loads(text, object_pairs_hook=hook, strict=False, parse_int=float)


def _require_once(pairs: list[tuple[str, Any]]) -> None:
    """In the place of each object: it is let go at once."""
    if len(dict(pairs)) != len(pairs):
        raise _Repeated


class _Object(dict[str, Any]):
    """With its keys that come again."""

    repeated: list[str]


def _with_repeated(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object(pairs)
    counts = Counter(key for key, _ in pairs)
    found.repeated = [key for key, count in counts.items() if count > 1]
    return found


def _places(value: Any, place: Place) -> Iterator[Place]:
    if isinstance(value, _Object):
        yield from ((*place, key[:LONGEST_KEY]) for key in value.repeated)
        for key, inner in value.items():
            yield from _places(inner, (*place, key[:LONGEST_KEY]))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _places(inner, (*place, index))
