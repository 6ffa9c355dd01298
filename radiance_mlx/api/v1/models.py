"""`GET /v1/models`: what can be asked."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...messages import BASE, STABLE, Generate
from ...service import Service
from ...store import CheckpointRecord
from ..routing import service_of
from ..writing import JSONResponse
from . import shapes
from .asking import TRAINING, checkpoint_of

_STARTED = int(time.time())


async def list_models(request: Request) -> Response:
    """Every id that can be asked: names that move, and checkpoints."""
    service = service_of(request)
    records = [r for r in await service.checkpoints() if not r.pruned and r.damaged is None]
    moving = [_moving(service, name) for name in dict.fromkeys((STABLE, service.config.base_model, BASE, TRAINING))]
    kept = {record.checkpoint: _kept(record) for record in reversed(records)}
    names = await service.tuning.names()
    named = [{**kept[checkpoint], "id": name} for name, checkpoint in names.items() if checkpoint in kept]
    data = [*moving, *named, *kept.values()]
    return JSONResponse({"object": "list", "data": data}, headers=shapes.headers(*service.current))


async def get_model(request: Request) -> Response:
    """One of them."""
    service = service_of(request)
    model = request.path_params["model"]
    checkpoint = await checkpoint_of(service, model)
    if checkpoint in (STABLE, BASE):
        return _told(service, _moving(service, model))
    await service.address(Generate((), checkpoint))  # raises if it cannot answer any more
    return _told(service, {**_kept(await service.checkpoint(checkpoint)), "id": model})


def _told(service: Service, found: dict[str, Any]) -> Response:
    return JSONResponse(found, headers=shapes.headers(*service.current))


def _moving(service: Service, name: str) -> dict[str, Any]:
    current = service.current[0]
    checkpoint = BASE if name == BASE else (service.in_training if name == TRAINING else None) or current
    return _model(name, _STARTED, checkpoint)


def _kept(record: CheckpointRecord) -> dict[str, Any]:
    found = _model(record.checkpoint, int(record.created), record.checkpoint)
    return {**found, "status": record.status, "parent": record.parent or BASE}


def _model(name: str, created: int, checkpoint: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "radiance_mlx", "checkpoint": checkpoint}
