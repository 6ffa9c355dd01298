"""A streamed answer as server-sent events: `data: {"text": …}`, the whole answer, `data: [DONE]`."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from sse_starlette.sse import EventSourceResponse

from ..errors import RadianceError
from ..messages import Answer, TextDelta
from .responses import answer_body
from .writing import written

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


def streamed_work(
    work: Callable[[Callable[[int, int], None]], Awaitable[dict[str, Any]]], serving: Callable[[], dict[str, str]]
) -> EventSourceResponse:
    """Events `{"done": n, "of": m}` while `work` goes on, then what it gives; leaving ends it."""
    return EventSourceResponse(_work_events(work, serving), ping=15)


async def _work_events(
    work: Callable[[Callable[[int, int], None]], Awaitable[dict[str, Any]]], serving: Callable[[], dict[str, str]]
) -> AsyncIterator[dict[str, str]]:
    told: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    task = asyncio.ensure_future(work(lambda done, of: told.put_nowait({"done": done, "of": of})))
    task.add_done_callback(lambda _: told.put_nowait(None))
    try:
        while (event := await told.get()) is not None:
            yield _data(event)
        yield _data({**task.result(), **serving()})
    except RadianceError as error:
        yield _data({"error": error.as_dict()})
    finally:
        task.cancel()
    yield {"data": "[DONE]"}


def _of(item: TextDelta | Answer, started: float) -> list[dict[str, str]]:
    if isinstance(item, Answer):
        return [_data(answer_body(item, time.perf_counter() - started))]
    reasoning = [_data({"reasoning": item.reasoning})] if item.reasoning else []
    return [*reasoning, _data({"text": item.text})] if item.text else reasoning


def _data(body: dict[str, Any]) -> dict[str, str]:
    return {"data": written(body)}
