"""The routes: read, ask the service, answer. Each handler is a few lines; `TABLE` describes them all."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast, get_args

from starlette.requests import Request
from starlette.responses import Response

from ..errors import InvalidRequest
from ..messages import FINAL_STATES, EventKind, JobState
from . import schemas
from .bodies import parse, parse_update, read_body
from .responses import answer_body, checkpoint_body, event_body, job_body
from .routing import RouteFacts, number, one_of, service_of, serving, unless_client_leaves
from .sse import streamed, streamed_work
from .writing import JSONResponse


async def search(request: Request) -> Response:
    """Answer a prompt from the stable checkpoint, or the one named."""
    started = time.perf_counter()
    service = service_of(request)
    body = parse(schemas.SearchRequest, await read_body(request, service.config.server))
    asked = body.as_request()
    if asked.stream:
        pieces = service.stream(asked)
        first = await unless_client_leaves(request, anext(pieces))  # what goes wrong before has its own status
        return streamed(first, pieces, started)
    answer = await unless_client_leaves(request, service.search(asked))
    return JSONResponse(answer_body(answer, time.perf_counter() - started))


async def update(request: Request) -> Response:
    """Accept examples for training; they are durable once this answers."""
    service = service_of(request)
    raw = await read_body(request, service.config.server)
    # in a thread: thousands take seconds
    examples, tags = await asyncio.to_thread(parse_update, raw, service.config.server.max_body_mb)
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 255:
        raise InvalidRequest("The Idempotency-Key must have 1 to 255 characters.")
    job, _ = await service.update(examples, tags, raw=raw, idempotency_key=key)
    body = {"job_id": job.job_id, "queued": job.state not in FINAL_STATES}
    return JSONResponse({**body, **serving(service)}, 202)


async def info(request: Request) -> Response:
    """Status, loss curves, forgetting, hardware, configuration."""
    return JSONResponse(await service_of(request).info())


async def jobs(request: Request) -> Response:
    """Jobs, newest first."""
    service = service_of(request)
    state = one_of(request, "state", get_args(JobState))
    limit = number(request, "limit", 100, 1, 1000)
    before = number(request, "before", 0, 0, 2**62) or None
    found = await service.jobs(state, limit, before)
    following = found[-1].number if len(found) == limit else None
    bodies = [job_body(job, service.progress_of(job)) for job in found]
    return JSONResponse({"jobs": bodies, "next": following, **serving(service)})


async def job(request: Request) -> Response:
    """One job."""
    service = service_of(request)
    found = await service.job(request.path_params["job_id"])
    return JSONResponse({**job_body(found, service.progress_of(found)), "serving": serving(service)})


async def cancel_job(request: Request) -> Response:
    """Cancel a job in any state before publication; 202 while its training is being stopped."""
    service = service_of(request)
    found = await service.cancel(request.path_params["job_id"])
    body = {**job_body(found, service.progress_of(found)), "serving": serving(service)}
    return JSONResponse(body, 200 if found.state in FINAL_STATES else 202)


async def checkpoints(request: Request) -> Response:
    """The lineage of this base, oldest first."""
    service = service_of(request)
    current, _ = service.current
    found = [checkpoint_body(record, current) for record in await service.checkpoints()]
    return JSONResponse({"checkpoints": found, "current": current, **serving(service)})


async def checkpoint(request: Request) -> Response:
    """One checkpoint with its metrics."""
    service = service_of(request)
    record = await service.checkpoint(request.path_params["checkpoint"])
    return JSONResponse({**checkpoint_body(record, service.current[0]), "serving": serving(service)})


async def rollback(request: Request) -> Response:
    """Move the stable pointer to the parent, to a named checkpoint, or to the base."""
    service = service_of(request)
    body = parse(schemas.RollbackRequest, await read_body(request, service.config.server, optional=True))
    previous = await service.rollback(body.to, body.reason)
    current, status = service.current
    return JSONResponse({"checkpoint": current, "checkpoint_status": status, "previous": previous})


async def events(request: Request) -> Response:
    """What happened, newest first: what was published, refused, rolled back and why, so what answered when."""
    service = service_of(request)
    kind = one_of(request, "kind", get_args(EventKind))
    limit = number(request, "limit", 100, 1, 1000)
    before = number(request, "before", 0, 0, 2**62) or None
    found = await service.events(cast(EventKind | None, kind), limit, before)
    following = found[-1]["id"] if len(found) == limit else None
    return JSONResponse({"events": [event_body(event) for event in found], "next": following, **serving(service)})


async def evaluate(request: Request) -> Response:
    """Measure checkpoints on anchors; with `stream: true` events tell how many are done."""
    service = service_of(request)
    body = parse(schemas.EvalRequest, await read_body(request, service.config.server, optional=True))
    anchors = _anchors_of(body)

    def measure(report: Callable[[int, int], None]) -> Awaitable[dict[str, Any]]:
        return service.evaluate(body.checkpoints, body.against, anchors, report)

    if body.stream:
        return streamed_work(measure, lambda: serving(service))
    found = await unless_client_leaves(request, measure(lambda done, of: None))
    return JSONResponse({**found, **serving(service)})


def _anchors_of(body: schemas.EvalRequest) -> dict[str, Any]:
    """What the request asks for in other words than the configuration."""
    given = {
        "provider": body.anchor_provider or ("hf" if body.anchor_dataset else None),
        "dataset": body.anchor_dataset,
        "split": body.anchor_split,
        "sample": body.anchor_sample,
        "columns": tuple(body.anchor_columns) if body.anchor_columns is not None else None,
    }
    if body.anchor_dataset and Path(body.anchor_dataset).exists():
        raise InvalidRequest(f"{body.anchor_dataset} is a path of this machine.", "Name a data set of the hub.")
    return {name: value for name, value in given.items() if value is not None}


async def healthz(request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Whether a search can be answered now."""
    ready = service_of(request).ready
    return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)


TABLE = (
    RouteFacts(
        "POST",
        "/search",
        search,
        schemas.SearchAnswer,
        body=schemas.SearchRequest,
        streams=True,
        errors=(400, 404, 408, 409, 413, 415, 422, 503),
    ),
    RouteFacts(
        "POST",
        "/update",
        update,
        schemas.UpdateAnswer,
        status=202,
        body=schemas.UpdateRequest,
        idempotent=True,
        errors=(400, 408, 413, 415, 422, 503, 507),
    ),
    RouteFacts("GET", "/info", info, schemas.Info, errors=(503,)),
    RouteFacts(
        "GET",
        "/jobs",
        jobs,
        schemas.Jobs,
        errors=(422, 503),
        query={"state": "string", "limit": "integer", "before": "integer"},
    ),
    RouteFacts("GET", "/jobs/{job_id}", job, schemas.Job, errors=(404, 503)),
    RouteFacts("DELETE", "/jobs/{job_id}", cancel_job, schemas.Job, errors=(404, 409, 503, 507)),
    RouteFacts("GET", "/checkpoints", checkpoints, schemas.Checkpoints, errors=(503,)),
    RouteFacts("GET", "/checkpoints/{checkpoint}", checkpoint, schemas.Checkpoint, errors=(404, 503)),
    RouteFacts(
        "POST",
        "/rollback",
        rollback,
        schemas.RollbackAnswer,
        body=schemas.RollbackRequest,
        body_optional=True,
        errors=(400, 404, 408, 409, 413, 415, 422, 503, 507),
    ),
    RouteFacts(
        "GET",
        "/events",
        events,
        schemas.Events,
        errors=(422, 503),
        query={"kind": "string", "limit": "integer", "before": "integer"},
    ),
    RouteFacts(
        "POST",
        "/eval",
        evaluate,
        schemas.EvalAnswer,
        body=schemas.EvalRequest,
        streams=True,
        body_optional=True,
        errors=(400, 404, 408, 409, 413, 415, 422, 503),
    ),
    RouteFacts("GET", "/healthz", healthz, schemas.Health),
    RouteFacts("GET", "/readyz", readyz, schemas.Health, errors=(503,)),
)
