"""Chunks as server-sent events: `data: {chunk}`, an error in the middle as `data: {"error": …}`, `data: [DONE]`."""

import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any

import structlog
from sse_starlette.sse import EventSourceResponse
from starlette.requests import Request

from ...errors import InternalError, RadianceError
from ...messages import Answer, TextDelta
from ...service import Service
from ..routing import unless_client_leaves
from . import shapes
from .asking import Numbered
from .errors import error_body

log = structlog.get_logger(__name__)
Event = dict[str, str]
#: (the question's number, what came) → choices of chunks, each with its index
Choices = Callable[[int, TextDelta | Answer], Iterable[dict[str, Any]]]


async def streamed(
    request: Request,
    service: Service,
    pieces: AsyncIterator[Numbered],
    *,
    kind: str,
    ident: str,
    choices: Choices,
    n: int,
    include_usage: bool,
) -> EventSourceResponse:
    """The response, once the first piece is there: what goes wrong before has its own status.

    A client that leaves closes `pieces`, which ends what still goes on.
    """
    try:
        first = await unless_client_leaves(request, anext(pieces))
    except BaseException:
        await pieces.aclose()  # type: ignore[attr-defined]
        raise
    came = first[1]
    head = await shapes.head(service, kind, ident, came.checkpoint, came.checkpoint_status)
    chunks = _chunks(first, pieces, head, choices, n, include_usage)
    return sse(chunks, shapes.headers(came.checkpoint, came.checkpoint_status))


def sse(documents: AsyncIterator[dict[str, Any]], headers: dict[str, str] | None = None) -> EventSourceResponse:
    """`documents` as events, then `[DONE]`; an error ends them as an event."""
    return EventSourceResponse(_events(documents), ping=15, sep="\n", headers=headers)


async def _events(documents: AsyncIterator[dict[str, Any]]) -> AsyncIterator[Event]:
    try:
        async with aclosing(documents):  # type: ignore[type-var]
            async for document in documents:
                yield _data(document)
    except RadianceError as error:
        yield _data(error_body(error))
    except Exception as error:
        log.error("a stream failed", exc_info=error)
        yield _data(error_body(InternalError.of(error)))
    yield {"data": "[DONE]"}


async def _chunks(
    first: Numbered,
    rest: AsyncIterator[Numbered],
    head: dict[str, Any],
    choices: Choices,
    n: int,
    include_usage: bool,
) -> AsyncIterator[dict[str, Any]]:
    answers: dict[int, Answer] = {}
    none_yet = {"usage": None} if include_usage else {}

    def of(item: Numbered) -> list[dict[str, Any]]:
        number, came = item
        if isinstance(came, Answer):
            answers[number] = came
        return [{**head, "choices": [choice], **none_yet} for choice in choices(number, came)]

    async with aclosing(rest):  # type: ignore[type-var]
        for chunk in of(first):
            yield chunk
        async for item in rest:
            for chunk in of(item):
                yield chunk
    if include_usage:
        yield {**head, "choices": [], "usage": shapes.usage(answers, n)}


def _data(document: dict[str, Any]) -> Event:
    return {"data": json.dumps(document)}  # in ASCII: no character is a line's end to some client
