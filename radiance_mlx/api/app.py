"""The ASGI application over one `Service`."""

from difflib import get_close_matches

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import InternalError, MethodNotAllowed, NotFound, RadianceError
from ..service import Service
from .openapi import OWN_PATH, TABLE, document, shown
from .responses import error_response
from .security import Guard
from .writing import JSONResponse

log = structlog.get_logger(__name__)


def make_app(service: Service) -> Starlette:
    """All routes, errors as JSON, the guard in front. Starting and stopping the service is the caller's."""
    described = document()

    async def openapi(request: Request) -> Response:
        return JSONResponse(described)

    routes = [Route(facts.path, facts.handler, methods=[facts.method]) for facts in TABLE]
    app = Starlette(
        routes=[*routes, Route(OWN_PATH, openapi)],
        middleware=[Middleware(Guard, settings=service.config.server)],
        exception_handlers={
            RadianceError: _told,
            HTTPException: _http,
            Exception: _bug,
        },
    )
    app.state.service = service
    return app


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, RadianceError)
    return error_response(error, request.url.path)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        alike = get_close_matches(path, sorted({shown(facts.path) for facts in TABLE}), n=3)
        meant = f"Is {' or '.join(alike)} meant? " if alike else ""
        return error_response(NotFound(f"There is no route {path}.", f"{meant}GET {OWN_PATH} lists all."), path)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        answer = error_response(MethodNotAllowed(f"{request.method} is not for {path}.", f"Allowed: {allowed}."), path)
        answer.headers["allow"] = allowed
        return answer
    fault = RadianceError(str(error.detail))
    fault.status = error.status_code
    return error_response(fault, path)


async def _bug(request: Request, error: Exception) -> Response:
    log.error("unexpected error", path=request.url.path, exc_info=error)
    return error_response(InternalError.of(error), request.url.path)
