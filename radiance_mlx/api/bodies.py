"""Reading a request's body: bounded in size and time, JSON in UTF-8 only, every fault named."""

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from ..config.schema import ServerSection
from ..errors import InvalidRequest, MalformedBody, PayloadTooLarge, RequestTimeout, UnsupportedMediaType
from ..messages import Example
from ..rows import SHAPES, understand
from ..rows.limits import MAX_BODY_MB, Room
from .repeated import Place, repeated_keys
from .schemas import UpdateEnvelope

M = TypeVar("M", bound=BaseModel)
JSON = "application/json"


async def read_body(request: Request, settings: ServerSection, *, optional: bool = False) -> bytes:
    """The raw body; if it is `optional`, no body at all is `{}`.

    Raises `UnsupportedMediaType`, `PayloadTooLarge`, `RequestTimeout`, `MalformedBody`.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    body = b""
    if kind == JSON or (optional and not kind):
        body = await content_of(request, settings)
        if optional and not body:
            return b"{}"
    if kind != JSON:
        raise UnsupportedMediaType(
            f"The content type is {kind or 'missing'}.", f"Send JSON with 'content-type: {JSON}'."
        )
    return body


async def content_of(request: Request, settings: ServerSection) -> bytes:
    """Whatever it is, bounded in size and time. Raises `PayloadTooLarge`, `RequestTimeout`, `MalformedBody`."""
    limit = int(settings.max_body_mb * 2**20)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise PayloadTooLarge(
                        f"The body is larger than {settings.max_body_mb:g} MB.",
                        "Post fewer examples at once, or raise server.max_body_mb.",
                    )
    except TimeoutError:
        raise RequestTimeout(f"The body did not come within {settings.body_timeout_s:g} s.") from None
    except ClientDisconnect:
        raise MalformedBody("The client left before the body was complete.") from None
    return bytes(body)


def parse(model: type[M], body: bytes) -> M:
    """`body` as `model`. Raises `MalformedBody` or `InvalidRequest` with every fault in `details`."""
    try:
        parsed = model.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None
    if places := repeated_keys(body):
        raise _unusable([{"field": _field(place), "problem": "is there more than once"} for place in places])
    return parsed


def parse_update(body: bytes, max_body_mb: float = MAX_BODY_MB) -> tuple[list[Example], list[str]]:
    """Examples and tags of an update. Every bad example is named at once, by its index; a chat may be several.

    Raises `MalformedBody`, `InvalidRequest`; `PayloadTooLarge` for what its chats become (`rows.limits`).
    """
    envelope = parse(UpdateEnvelope, body)
    examples: list[Example] = []
    faults: list[dict[str, Any]] = []
    room = Room(max_body_mb)
    for index, row in enumerate(envelope.examples):
        try:
            found = understand(row).examples
        except InvalidRequest as error:
            faults.append({"example": index, "problems": error.details or [{"problem": error.message}]})
        else:
            room.take(found)
            examples += found
    if faults:
        count = f"{len(faults)} of {len(envelope.examples)} examples"
        named = ", ".join(str(fault["example"]) for fault in faults[:20])
        raise InvalidRequest(
            f"{count} cannot be used (index {named}{', …' if len(faults) > 20 else ''}); nothing was stored.",
            f"An example is {SHAPES}.",
            faults,
        )
    return examples, envelope.tags


def _explain(error: ValidationError) -> MalformedBody | InvalidRequest:
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    if any(fault["type"] == "json_invalid" for fault in faults):
        return MalformedBody(f"The body is not JSON in UTF-8: {faults[0]['msg']}", "Check quotes and commas.")
    return _unusable(
        [{"field": _field(fault["loc"]), "problem": fault["msg"].removeprefix("Value error, ")} for fault in faults]
    )


def _field(place: Place) -> str:
    return ".".join(str(part) for part in place)


def _unusable(details: list[dict[str, str]]) -> InvalidRequest:
    said = "; ".join(f"{d['field']}: {d['problem']}" if d["field"] else d["problem"] for d in details[:5])
    return InvalidRequest(f"The request cannot be used: {said}", "GET /openapi.json describes it.", details)
