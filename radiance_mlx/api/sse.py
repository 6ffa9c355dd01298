"""A streamed answer as server-sent events: `data: {"text": …}`, the whole answer, `data: [DONE]`."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from sse_starlette.sse import EventSourceResponse

from ..errors import RadianceError
from ..messages import Answer, Generate
from ..service import Service
from .responses import answer_body


def streamed(service: Service, request: Generate, started: float) -> EventSourceResponse:
    """The response for a request that has been through `Service.address`."""
    return EventSourceResponse(_events(service, request, started), ping=15)


async def _events(service: Service, request: Generate, started: float) -> AsyncIterator[dict[str, str]]:
    try:
        async with aclosing(service.stream(request)) as pieces:  # type: ignore[type-var]
            async for item in pieces:
                if isinstance(item, Answer):
                    yield _data(answer_body(item, time.perf_counter() - started))
                else:
                    if item.reasoning:
                        yield _data({"reasoning": item.reasoning})
                    if item.text:
                        yield _data({"text": item.text})
    except RadianceError as error:
        yield _data({"error": error.as_dict()})
    yield {"data": "[DONE]"}


def _data(body: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(body, ensure_ascii=False)}
