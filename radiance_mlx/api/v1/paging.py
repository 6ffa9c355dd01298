"""Lists in pages, as OpenAI's clients turn them: `after` the last id of the page before, `limit`, `has_more`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from .errors import BadParameter

T = TypeVar("T")


def page(
    request: Request, items: Sequence[T], shown: Callable[[T], dict[str, Any]], *, limit: int = 20, most: int = 100
) -> dict[str, Any]:
    """The part of `items` that was asked for; `shown` gives each one's document. Raises `BadParameter`."""
    count = whole(request, "limit", limit, 1, most)
    documents = [shown(item) for item in items]
    start, after = 0, request.query_params.get("after")
    if after is not None:
        places = [place for place, document in enumerate(documents) if document["id"] == after]
        if not places:
            raise BadParameter("after", f"'after' names {after!r}, which is not in this list.")
        start = places[0] + 1
    data = documents[start : start + count]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": start + count < len(documents),
    }


def whole(request: Request, name: str, default: int, low: int, high: int) -> int:
    """A whole number of the query. Raises `BadParameter`."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise BadParameter(name, f"'{name}' must be a whole number from {low} to {high}.")
    return int(text)


def chosen(request: Request, name: str, default: str, among: Sequence[str]) -> str:
    """One of some words of the query. Raises `BadParameter`."""
    text = request.query_params.get(name, default)
    if text not in among:
        raise BadParameter(name, f"'{name}' must be {' or '.join(among)}.")
    return text
