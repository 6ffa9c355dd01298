"""What every route needs: the service behind it, parameters, clients that leave, and how it is described."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from ..errors import Cancelled, InvalidRequest
from ..service import Service
from . import schemas

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


def service_of(request: Request) -> Service:
    """The service behind this request."""
    service: Service = request.app.state.service
    return service


def serving(service: Service) -> dict[str, str]:
    """What answers by default now: every answer says it."""
    checkpoint, status = service.current
    return {"checkpoint": checkpoint, "checkpoint_status": status}


async def unless_client_leaves(request: Request, answering: Awaitable[T]) -> T:
    """Await an answer; if the client disconnects first, cancel it, which ends the generation, before this raises."""
    task = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("The client left before the answer was complete.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def number(request: Request, name: str, default: int, low: int, high: int) -> int:
    """A whole number of the query, of digits alone; `low` is 0 or more. Raises `InvalidRequest`."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
        raise InvalidRequest(f"'{name}' must be a whole number from {low} to {high}.")
    return int(text)


def one_of(request: Request, name: str, known: Sequence[str]) -> str | None:
    """A word of the query, if it is there. Raises `InvalidRequest` for one that is not `known`."""
    word = request.query_params.get(name)
    if word is not None and word not in known:
        raise InvalidRequest(f"There is no {name} {word}.", f"There are {', '.join(known)}.")
    return word


@dataclass(frozen=True)
class RouteFacts:
    """One route, for Starlette and for `/openapi.json`."""

    method: str
    path: str
    handler: Handler
    answer: type[BaseModel]
    status: int = 200
    body: type[BaseModel] | None = None
    body_optional: bool = False
    errors: tuple[int, ...] = ()
    query: dict[str, Any] = field(default_factory=dict)  # name → type, or a whole schema
    streams: bool = False  # may answer as server-sent events instead
    chunk: type[BaseModel] | None = None  # what such an event's data is, if that is described
    error: type[BaseModel] = schemas.ErrorAnswer
    form: dict[str, Any] | None = None  # the schema of a body in parts, in the place of `body`
    media: str = "application/json"  # of the answer
    idempotent: bool = False  # whether an Idempotency-Key is honoured
