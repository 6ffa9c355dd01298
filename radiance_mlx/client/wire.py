"""What goes over the wire: bodies as JSON, answers and errors back, server-sent events. No connection here."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from .. import errors
from ..errors import ConfigError, InvalidRequest, RadianceError, RequestTimeout, ServiceUnreachable
from . import arguments

Json = dict[str, Any]


def authorization(token: str | None) -> dict[str, str]:
    if not token:
        return {}
    if not token.isascii() or not token.isprintable():
        raise ConfigError("The token may hold printable ASCII characters only.", "Check server.token.")
    return {"Authorization": f"Bearer {token}"}


def segment(name: str) -> str:
    """`name` as one part of a path. An empty one would mean the whole list."""
    if not arguments.text("the id", name):
        raise InvalidRequest("The request cannot be sent: the id is empty.")
    return quote(utf8(name, "id"), safe="")


def utf8(text: str, what: str) -> str:
    """`text`. Raises `InvalidRequest` if it is none, or bytes that are not UTF-8 got into it (as surrogates)."""
    if not _is_utf8(arguments.text(f"the {what}", text)):
        raise InvalidRequest(f"The request cannot be sent: the {what} is not UTF-8 text.")
    return text


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_body(body: Json) -> bytes:
    """`body` as JSON in UTF-8. Raises `InvalidRequest` that names what JSON in UTF-8 cannot hold."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        faults = list(_unsendable(body)) if not isinstance(error, RecursionError) else []
        said = "; ".join(f"{fault['field']}: {fault['problem']}" for fault in faults[:5])
        raise InvalidRequest(f"The request cannot be sent: {said or error}", details=faults) from error


def _unsendable(value: Any, path: str = "") -> Iterator[dict[str, str]]:
    """Each part of `value` that keeps it from being sent, as `{field, problem}`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _unsendable(key, path or "a key")
            yield from _unsendable(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _unsendable(inner, f"{path}.{index}")
    elif isinstance(value, str) and not _is_utf8(value):
        yield {"field": path, "problem": "not UTF-8 text"}
    elif isinstance(value, float) and not math.isfinite(value):
        yield {"field": path, "problem": f"{value} is not a finite number"}


def search_body(prompt: str | Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Json:
    if options.get("stream"):
        raise InvalidRequest(
            "The request cannot be sent: search gives whole answers.", "Use search_stream for a stream."
        )
    question: Json = {"prompt": prompt}
    if not isinstance(prompt, str):
        question = {"messages": arguments.mappings("prompt", prompt, "text, or a list of chat messages")}
    return {**question, **{key: value for key, value in options.items() if value is not None}}


def _by_code() -> dict[str, type[RadianceError]]:
    classes = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, RadianceError)]
    return {cls.code: cls for cls in classes}


def error_from(body: Any, status: int) -> RadianceError:
    """The service's `{"code", "message", "hint", "details"}` as the error of that code, with its status."""
    fault = body if isinstance(body, dict) else {}
    code = str(fault.get("code") or "error")
    message = str(fault.get("message") or f"The service answered with HTTP {status}.")
    error = _by_code().get(code, RadianceError)(message, str(fault.get("hint") or ""), fault.get("details"))
    error.code, error.status = code, status
    return error


def raise_for(response: httpx.Response) -> None:
    """Raises what an answer of 400 and above says."""
    if response.status_code >= 400:
        raise error_of(response)


def error_of(response: httpx.Response) -> RadianceError:
    """The error that is the answer; one of another program is `bad_answer`."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict) or "error" not in body:
        return _stranger(response)
    return error_from(body["error"], response.status_code)


def object_of(response: httpx.Response) -> Json:
    """The JSON object that is the answer."""
    try:
        body = response.json()
    except ValueError as error:
        raise _stranger(response) from error
    if not isinstance(body, dict):
        raise _stranger(response)
    return body


def _stranger(response: httpx.Response) -> RadianceError:
    kind = response.headers.get("content-type", "no content type").partition(";")[0]
    where = f"{response.request.method} {response.request.url}"
    error = RadianceError(
        f"What answers {where} is not this service (HTTP {response.status_code}, {kind}).",
        "Another program may listen on that port; check the address.",
    )
    error.code, error.status = "bad_answer", response.status_code
    return error


class EventReader:
    """Server-sent events as they come in pieces, until `[DONE]`; `done` says that it came.

    Lines are split on bytes: a JSON text may hold U+2028 and its like.
    """

    def __init__(self) -> None:
        self.done = False
        self._rest, self._data = b"", list[str]()

    def feed(self, chunk: bytes) -> Iterator[Json]:
        """The events that are whole now. An error event is raised."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode())
            elif not line and self._data:
                text, self._data = "\n".join(self._data), []
                if text == "[DONE]":
                    self.done = True
                    return
                event = _event(text)
                if "error" in event:
                    raise error_from(event["error"], 500)
                yield event

    def finish(self) -> None:
        """No more comes. Raises `ServiceUnreachable` if there was no `[DONE]`."""
        if not self.done:
            raise ServiceUnreachable("The service closed the stream before the answer was complete.")


def _event(text: str) -> Json:
    try:
        event = json.loads(text)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        error = RadianceError("An event of the stream is no JSON object.", "Another program may answer there.")
        error.code = "bad_answer"
        raise error
    return event


def fault_of(error: httpx.HTTPError, url: str, hint: str) -> RadianceError:
    """httpx's faults as ours."""
    if isinstance(error, httpx.ConnectTimeout):
        return ServiceUnreachable(f"No service answers at {url} (no reply).", hint)
    if isinstance(error, httpx.TimeoutException):
        return RequestTimeout(f"The service at {url} did not answer in time.", "It may be busy; try again.")
    if isinstance(error, httpx.LocalProtocolError):
        return InvalidRequest(f"The request cannot be sent: {error}")
    if isinstance(error, httpx.ConnectError | httpx.UnsupportedProtocol):
        return ServiceUnreachable(f"No service answers at {url}.", hint)
    return ServiceUnreachable(f"The service at {url} closed the connection before its answer was complete.", hint)
