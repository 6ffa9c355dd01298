"""A streamed answer as server-sent events: `data: {"text": …}`, the whole answer, `data: [DONE]`."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from sse_starlette.sse import EventSourceResponse

from ..errors import RadianceError
from ..messages import Answer, TextDelta
from .responses import answer_body

Pieces = AsyncIterator[TextDelta | Answer]


def streamed(first: TextDelta | Answer, rest: Pieces, started: float) -> EventSourceResponse:
    """The response whose first piece has come already; leaving it closes `rest`."""
    return EventSourceResponse(_events(first, rest, started), ping=15)


async def _events(first: TextDelta | Answer, rest: Pieces, started: float) -> AsyncIterator[dict[str, str]]:
    try:
        async with aclosing(rest):  # type: ignore[type-var]
            for event in _of(first, started):
                yield event
            async for item in rest:
                for event in _of(item, started):
                    yield event
    except RadianceError as error:
        yield _data({"error": error.as_dict()})
    yield {"data": "[DONE]"}


def _of(item: TextDelta | Answer, started: float) -> list[dict[str, str]]:
    if isinstance(item, Answer):
        return [_data(answer_body(item, time.perf_counter() - started))]
    reasoning = [_data({"reasoning": item.reasoning})] if item.reasoning else []
    return [*reasoning, _data({"text": item.text})] if item.text else reasoning


def _data(body: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(body, ensure_ascii=False)}
