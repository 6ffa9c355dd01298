"""Who may talk to the service: Host and Origin lists against web pages that reach for local services, a token.

A page in the user's browser can send requests to loopback, and by DNS rebinding under a name of its own. So a
Host that is not ours is refused on every route, and so is any Origin that is not listed; no CORS header is
ever sent.
"""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..config.schema import ServerSection, is_loopback
from ..errors import Forbidden, RadianceError, Unauthorized
from .responses import error_response

OPEN_ROUTES = ("/healthz", "/readyz")


class Guard:
    """Middleware. The token, if one is set, is asked for everywhere but on the health routes."""

    def __init__(self, app: ASGIApp, settings: ServerSection) -> None:
        self._app, self._settings = app, settings
        self._hosts = {host.lower() for host in settings.allowed_hosts}
        self._origins = set(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            local, _ = scope.get("server") or ("", None)
            self._check(Headers(scope=scope), scope["path"], local.lower().removeprefix("::ffff:"))
        except RadianceError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers, path: str, local: str) -> None:
        host = _without_port(headers.get("host", ""))
        # the address that was connected to is ours, and no name that somebody else could point here
        ours = host in self._hosts or host == self._settings.host.lower() or (local and host.strip("[]") == local)
        if not (is_loopback(host) or ours):
            raise Forbidden(f"The host {host or '(none)'} is not on the list.", "See server.allowed_hosts.")
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and not _same_origin(origin, headers):
            raise Forbidden(f"The origin {origin} is not on the list.", "See server.allowed_origins.")
        if self._settings.token and path not in OPEN_ROUTES:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # header values are bytes, read as Latin-1
            right = hmac.compare_digest(given.strip().encode("latin-1"), self._settings.token.encode())
            if scheme.lower() != "bearer" or not right:
                raise Unauthorized("A token is needed.", "Send 'authorization: Bearer <server.token>'.")


def _without_port(host: str) -> str:
    host = host.lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _same_origin(origin: str, headers: Headers) -> bool:
    return origin.partition("://")[2] == headers.get("host", "")
