"""Lists in pages, as OpenAI's clients turn them: `after` the last id of the page before, `limit`, `has_more`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from ...errors import InvalidRequest
from ..routing import number
from .errors import BadParameter

T = TypeVar("T")


def page(
    request: Request,
    items: Sequence[T],
    shown: Callable[[T], dict[str, Any]],
    *,
    limit: int = 20,
    most: int = 100,
) -> dict[str, Any]:
    """The part of `items` that was asked for, each as `shown` gives it. Raises `BadParameter`."""
    count = whole(request, "limit", limit, 1, most)
    start, after = 0, request.query_params.get("after")
    if after is not None:
        place = next((place for place, item in enumerate(items) if shown(item)["id"] == after), None)
        if place is None:
            raise not_listed(after)
        start = place + 1
    return document([shown(item) for item in items[start : start + count]], start + count < len(items))


def document(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """One page of documents; whether there are `more` after it."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": more,
    }


def not_listed(after: str | None) -> BadParameter:
    """What `after` names is in no page."""
    return BadParameter("after", f"'after' names {after!r}, which is not in this list.")


def whole(request: Request, name: str, default: int, low: int, high: int) -> int:
    """A whole number of the query. Raises `BadParameter`."""
    try:
        return number(request, name, default, low, high)
    except InvalidRequest as error:
        raise BadParameter(name, error.message) from None


def chosen(request: Request, name: str, default: str, among: Sequence[str]) -> str:
    """One of some words of the query. Raises `BadParameter`."""
    text = request.query_params.get(name, default)
    if text not in among:
        raise BadParameter(name, f"'{name}' must be {' or '.join(among)}.")
    return text
