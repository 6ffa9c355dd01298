"""`/v1/fine_tuning/jobs`: the service's own jobs, as OpenAI's clients drive them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...errors import InvalidRequest, NotFound, PayloadTooLarge, StoreError
from ...messages import FINAL_STATES, STABLE, Example
from ...service import Service
from ...store import Tuned
from ..routing import service_of
from ..writing import JSONResponse
from . import shapes
from .asking import TRAINING, checkpoint_of
from .errors import BadParameter
from .files import examples_of_file
from .paging import chosen, document, not_listed, page, whole
from .parsing import parsed
from .stream import sse
from .tuning_requests import TuningRequest
from .tuning_shapes import Events, checkpoint_bodies, tuning_body

POLL_S = 0.2


async def create_tuning(request: Request) -> Response:
    """Accept a job; it is durable once this answers, and does not need its files any more."""
    service = service_of(request)
    body = await parsed(request, TuningRequest)
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 255:
        raise BadParameter(None, "The Idempotency-Key must have 1 to 255 characters.")
    asked = body.model_dump(exclude_none=True)
    known = await service.tuning.known(asked, key)  # first: its files may be gone by now, and its model another one
    if known is not None:
        return await _told(service, known)
    await _require_stable(service, body.model)
    examples = await _examples(service, "training_file", body.training_file)
    validation = await _examples(service, "validation_file", body.validation_file) if body.validation_file else []
    tuned = await service.tuning.create(
        asked,
        examples,
        validation,
        terms=body.terms(),
        suffix=body.suffix,
        idempotency_key=key,
    )
    return await _told(service, tuned)


async def _require_stable(service: Service, model: str) -> None:
    """Training goes on from the stable checkpoint. Raises `BadParameter`, `ModelNotFound`."""
    current = service.current[0]
    if model == TRAINING or await checkpoint_of(service, model) not in (STABLE, current):
        raise BadParameter(
            "model",
            f"'model' {model!r} cannot be trained: training goes on from the stable checkpoint, which is {current}.",
            "Name 'stable', or roll back to the checkpoint first.",
        )


async def _examples(service: Service, param: str, file_id: str) -> list[Example]:
    try:
        name = (await service.tuning.file(file_id)).filename
        examples = await examples_of_file(service, await service.tuning.content(file_id), name)
        await service.require_place_for_tools(examples)
        return examples
    except (NotFound, InvalidRequest, PayloadTooLarge) as error:
        raise BadParameter(param, f"'{param}': {error.message}", error.hint, "invalid_file") from None
    except StoreError as error:
        raise BadParameter(param, f"'{param}': {error.message}", error.hint, "invalid_file") from error


async def list_tunings(request: Request) -> Response:
    """Jobs, newest first; `metadata[key]=value` picks those that have it."""
    service = service_of(request)
    asked = request.query_params.items()
    wanted = {key[9:-1]: value for key, value in asked if key.startswith("metadata[") and key.endswith("]")}
    limit, after = whole(request, "limit", 20, 1, 100), request.query_params.get("after")
    try:
        made, more = await service.tuning.page(wanted, after, limit)
    except NotFound:
        raise not_listed(after) from None
    data = [tuning_body(service, (tuning, job), record) for tuning, job, record in made]
    listed = document(data, more)
    return JSONResponse(listed, headers=shapes.headers(*service.current))


async def get_tuning(request: Request) -> Response:
    """One of them."""
    service = service_of(request)
    return await _told(service, await service.tuning.one(request.path_params["job_id"]))


async def cancel_tuning(request: Request) -> Response:
    """Give a job up before it is published; what it has learnt so far is dropped."""
    service = service_of(request)
    return await _told(service, await service.tuning.cancel(request.path_params["job_id"]))


async def pause_tuning(request: Request) -> Response:
    """Have a job wait; what it has learnt so far is kept."""
    service = service_of(request)
    return await _told(service, await service.tuning.pause(request.path_params["job_id"]))


async def resume_tuning(request: Request) -> Response:
    """Have a paused job go on."""
    service = service_of(request)
    return await _told(service, await service.tuning.resume(request.path_params["job_id"]))


async def _told(service: Service, tuned: Tuned) -> Response:
    body = tuning_body(service, tuned, await service.tuning.made(tuned[1]))
    return JSONResponse(body, headers=shapes.headers(*service.current))


async def tuning_events(request: Request) -> Response:
    """What happened to a job, newest first; with `stream=true` from the beginning, as it happens, to its end."""
    service = service_of(request)
    tuned = await service.tuning.one(request.path_params["job_id"])
    if chosen(request, "stream", "false", ("true", "false")) == "true":
        return sse(_as_they_come(service, tuned), shapes.headers(*service.current))
    told = Events.all(tuned, await service.tuning.events(tuned[1].job_id))
    listed = page(request, told[::-1], lambda event: event)
    return JSONResponse(listed, headers=shapes.headers(*service.current))


async def _as_they_come(service: Service, tuned: Tuned) -> AsyncIterator[dict[str, Any]]:
    tuning, job = tuned
    events = Events(tuning)
    yield events.created()
    while True:
        _, job = await service.tuning.one(tuning.tuning_id)  # first: the journal has all that led to this state
        for event in events.more(await service.tuning.events(job.job_id, events.seen)):
            yield event
        if job.state in FINAL_STATES:
            break
        await asyncio.sleep(POLL_S)
    for event in events.end(job):
        yield event


async def tuning_checkpoints(request: Request) -> Response:
    """The checkpoint that a job became, with what was measured at its last step."""
    service = service_of(request)
    tuning, job = await service.tuning.one(request.path_params["job_id"])
    bodies = checkpoint_bodies(tuning, await service.tuning.made(job))
    return JSONResponse(page(request, bodies, lambda body: body, limit=10), headers=shapes.headers(*service.current))
