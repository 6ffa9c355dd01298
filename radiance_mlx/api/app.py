"""The ASGI application over one `Service`."""

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import InternalError, MethodNotAllowed, NotFound, RadianceError
from ..service import Service
from .openapi import OWN_PATH, document
from .responses import error_response
from .routes import TABLE
from .security import Guard

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
    return error_response(error)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        paths = ", ".join(sorted({*(facts.path for facts in TABLE), OWN_PATH}))
        return error_response(NotFound(f"There is no route {request.url.path}.", f"Routes: {paths}."))
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        answer = error_response(
            MethodNotAllowed(f"{request.method} is not for {request.url.path}.", f"Allowed: {allowed}.")
        )
        answer.headers["allow"] = allowed
        return answer
    fault = RadianceError(str(error.detail))
    fault.status = error.status_code
    return error_response(fault)


async def _bug(request: Request, error: Exception) -> Response:
    log.error("unexpected error", path=request.url.path, exc_info=error)
    return error_response(InternalError.of(error))
