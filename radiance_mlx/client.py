"""A client of a running service, for programs and for the commands.

`connect()` finds the service; a `Client` speaks to it. Every fault is a `RadianceError`: the service's own
errors come back as the class that carries their code, and no answer at all is `ServiceUnreachable`.

    with connect() as client:
        job = client.update([{"input": "Where is my key?", "output": "Under the mat."}])
        client.wait(job["job_id"])
        print(client.search("Where is my key?")["response"])
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from . import errors
from .errors import ConfigError, InvalidRequest, RadianceError, RequestTimeout, ServiceUnreachable
from .messages import FINAL_STATES

TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 5.0
SERVER_FILE = Path("state", "server.json")
START_HINT = "Start it with: python -m radiance_mlx run"

Json = dict[str, Any]


class Client:
    """Speaks to the service at `url`; safe to share between threads. Use it as a context manager."""

    def __init__(
        self, url: str, token: str | None = None, timeout: float = TIMEOUT_S, *, hint: str = START_HINT
    ) -> None:
        self.url = tidy_url(url)
        self._hint = hint
        local = is_local(self.url)
        self._http = httpx.Client(
            base_url=self.url,
            headers=_authorization(token),
            timeout=httpx.Timeout(timeout, connect=min(CONNECT_TIMEOUT_S, timeout)),
            trust_env=not local,  # a proxy for the web must not take requests to this machine
            verify=self.url.startswith("https"),  # plain HTTP needs no certificates: saves reading them
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # --- asking -------------------------------------------------------------------------------------

    def search(self, prompt: str | Sequence[Mapping[str, str]], **options: Any) -> Json:
        """The whole answer. `prompt` is text, or chat messages; `options` are the fields of POST /search."""
        return self._call("POST", "/search", body=_search_body(prompt, options))

    def stream(self, prompt: str | Sequence[Mapping[str, str]], **options: Any) -> Iterator[Json]:
        """Pieces (`{"text": …}` or `{"reasoning": …}`) as they come; the last event is the whole answer."""
        body = {**_search_body(prompt, options), "stream": True}
        with self._translated(), self._http.stream("POST", "/search", **_json(body)) as response:
            if response.status_code >= 400:
                response.read()
            _raise_for(response)
            yield from _events(response.iter_bytes())

    # --- teaching -----------------------------------------------------------------------------------

    def update(
        self,
        examples: Sequence[Mapping[str, Any]],
        tags: Sequence[str] = (),
        idempotency_key: str | None = None,
    ) -> Json:
        """Hand in examples to learn; `{"job_id": …, "queued": true, …}` when they are safely stored."""
        headers = None
        if idempotency_key is not None:  # an empty one too: the service refuses it
            headers = {b"Idempotency-Key": _utf8(idempotency_key, "idempotency key").encode()}
        body = {"examples": [dict(example) for example in examples], "tags": list(tags)}
        return self._call("POST", "/update", body=body, headers=headers)

    def wait(
        self,
        job_id: str,
        on_progress: Callable[[Json], None] | None = None,
        *,
        poll_s: float = 0.2,
        patience_s: float = 15.0,
    ) -> Json:
        """The job when it has ended, whatever its end; `on_progress` sees it at every look before that.

        A service that does not answer for less than `patience_s` (a restart) is waited for.
        """
        silent_since: float | None = None
        while True:
            try:
                job = self.job(job_id)
            except ServiceUnreachable:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > patience_s:
                    raise
            else:
                silent_since = None
                if job.get("state") in FINAL_STATES:
                    return job
                if on_progress:
                    on_progress(job)
            time.sleep(poll_s)

    # --- looking and steering -----------------------------------------------------------------------

    def info(self) -> Json:
        return self._call("GET", "/info")

    def jobs(self, state: str | None = None, limit: int | None = None, before: int | None = None) -> Json:
        """`{"jobs": […], "next": …, …}`, newest first; `next` is the `before` of the next page."""
        params = {"state": state and _utf8(state, "state"), "limit": limit, "before": before}
        return self._call("GET", "/jobs", params={k: v for k, v in params.items() if v is not None})

    def job(self, job_id: str) -> Json:
        return self._call("GET", f"/jobs/{_segment(job_id)}")

    def cancel(self, job_id: str) -> Json:
        """Cancel; a job in training comes back in the state of that moment and ends a little later."""
        return self._call("DELETE", f"/jobs/{_segment(job_id)}")

    def checkpoints(self) -> Json:
        """`{"checkpoints": […oldest first], "current": …, …}`."""
        return self._call("GET", "/checkpoints")

    def checkpoint(self, checkpoint_id: str) -> Json:
        return self._call("GET", f"/checkpoints/{_segment(checkpoint_id)}")

    def rollback(self, to: str | None = None, reason: str = "") -> Json:
        """Serve `to` from now on: a checkpoint, "base", or None for the parent of the current one."""
        return self._call("POST", "/rollback", body={"to": to, "reason": reason})

    def evaluate(
        self,
        checkpoints: Sequence[str] | None = None,
        against: str | None = None,
        on_progress: Callable[[int, int], None] = lambda done, of: None,
        **anchors: Any,
    ) -> Json:
        """Measure checkpoints (None: all) on anchors; `anchors` are the `anchor_…` fields of POST /eval."""
        listed = list(checkpoints) if checkpoints is not None else None
        body = {"checkpoints": listed, "against": against, **anchors, "stream": True}
        last: Json = {}
        with self._translated(), self._http.stream("POST", "/eval", **_json(body)) as response:
            if response.status_code >= 400:
                response.read()
            _raise_for(response)
            for event in _events(response.iter_bytes()):
                if "of" in event:
                    on_progress(event["done"], event["of"])
                last = event
        return last

    def is_ready(self) -> bool:
        """Whether a search can be answered now; False also when nothing answers."""
        try:
            with self._translated():
                return self._http.get("/readyz", timeout=CONNECT_TIMEOUT_S).status_code == 200
        except RadianceError:
            return False

    # --- the way there ------------------------------------------------------------------------------

    def _call(
        self,
        method: str,
        path: str,
        *,
        body: Json | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[bytes, bytes] | None = None,
    ) -> Json:
        sent = _json(body, headers) if body is not None else {"headers": headers}
        with self._translated():
            response = self._http.request(method, path, params=params, **sent)
            _raise_for(response)
            return _object(response)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """httpx's faults as ours."""
        try:
            yield
        except httpx.ConnectTimeout as error:
            raise ServiceUnreachable(f"No service answers at {self.url} (no reply).", self._hint) from error
        except httpx.TimeoutException as error:
            raise RequestTimeout(
                f"The service at {self.url} did not answer in time.", "It may be busy; try again."
            ) from error
        except httpx.LocalProtocolError as error:
            raise InvalidRequest(f"The request cannot be sent: {error}") from error
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            raise ServiceUnreachable(f"No service answers at {self.url}.", self._hint) from error
        except httpx.TransportError as error:
            raise ServiceUnreachable(
                f"The service at {self.url} closed the connection before its answer was complete.", self._hint
            ) from error


# --- which service --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Service:
    """Where to knock, with which token, and what to tell somebody who finds nobody there."""

    url: str
    token: str | None
    hint: str


def connect(
    url: str | None = None,
    *,
    home: Path | None = None,
    config_file: Path | None = None,
    token: str | None = None,
    timeout: float = TIMEOUT_S,
) -> Client:
    """A client of the service that `locate` finds; nothing is sent yet."""
    service = locate(url, home=home, config_file=config_file, token=token)
    return Client(service.url, service.token, timeout, hint=service.hint)


def locate(
    url: str | None = None,
    *,
    home: Path | None = None,
    config_file: Path | None = None,
    token: str | None = None,
) -> Service:
    """Which service: `url`, else RADIANCE_URL, else the one running on the home, else the configured address.

    The token is `token`, else RADIANCE_SERVER__TOKEN, else the configuration's; the configuration's is only
    sent to this machine or where the configuration itself points.
    """
    token = token or os.environ.get("RADIANCE_SERVER__TOKEN")
    address = url or os.environ.get("RADIANCE_URL")
    if address:
        address = tidy_url(address)
        where = "--url" if url else "RADIANCE_URL"
        if token is None and (config_file is not None or is_local(address)):
            token = _configured_token(config_file, home)
        return Service(address, token, f"That address is from {where}. {START_HINT}")
    from .config import load_config

    loaded = load_config(config_file=config_file, home=home)
    server = loaded.config.server
    hint = f"{START_HINT} --home {home}" if home else START_HINT
    running = read_server_file(loaded.home)
    address = running["url"] if running else configured_url(server.host, server.port)
    return Service(address, token or server.token, hint)


def configured_url(host: str, port: int) -> str:
    """The address at which a client of this machine reaches a server bound to `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def read_server_file(home: Path) -> Json | None:
    """What the service running on `home` says about itself, or None when none runs there."""
    try:
        facts = json.loads((home / SERVER_FILE).read_text(encoding="utf-8"))
        return facts if isinstance(facts["url"], str) and _is_alive(int(facts["pid"])) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tidy_url(url: str) -> str:
    """`localhost:8321/` as `http://localhost:8321`. Raises `ConfigError` for what is no address."""
    text = url.strip()
    text = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urlsplit(text)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        sound = sound and not any(c.isspace() for c in text)
        httpx.URL(text)
    except (ValueError, httpx.InvalidURL):
        sound = False
    if not sound:
        raise ConfigError(f"{url!r} is not the address of a service.", "Like this: http://127.0.0.1:8321")
    return text


def is_local(url: str) -> bool:
    """Whether `url` points to this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _configured_token(config_file: Path | None, home: Path | None) -> str | None:
    from .config import load_config

    try:
        return load_config(config_file=config_file, home=home).config.server.token
    except ConfigError:
        if config_file is not None:
            raise
        return None  # the address was given, so a faulty configuration is not in the way


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return pid > 0


# --- bodies and answers ---------------------------------------------------------------------------------


def _authorization(token: str | None) -> dict[str, str]:
    if not token:
        return {}
    if not token.isascii() or not token.isprintable():
        raise ConfigError("The token may hold printable ASCII characters only.", "Check server.token.")
    return {"Authorization": f"Bearer {token}"}


def _segment(name: str) -> str:
    """`name` as one part of a path. An empty one would mean the whole list."""
    from urllib.parse import quote

    if not name:
        raise InvalidRequest("The request cannot be sent: the id is empty.")
    return quote(_utf8(name, "id"), safe="")


def _utf8(text: str, what: str) -> str:
    """`text`. Raises `InvalidRequest` if bytes that are not UTF-8 got into it (as surrogates)."""
    if not _is_utf8(text):
        raise InvalidRequest(f"The request cannot be sent: the {what} is not UTF-8 text.")
    return text


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(body: Json, headers: Mapping[bytes, bytes] | None = None) -> dict[str, Any]:
    """httpx's arguments for `body`. Raises `InvalidRequest` that names what JSON in UTF-8 cannot hold."""
    try:
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        faults = list(_unsendable(body)) if not isinstance(error, RecursionError) else []
        said = "; ".join(f"{fault['field']}: {fault['problem']}" for fault in faults[:5])
        raise InvalidRequest(f"The request cannot be sent: {said or error}", details=faults) from error
    return {"content": content, "headers": {**(headers or {}), b"Content-Type": b"application/json"}}


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


def _search_body(prompt: str | Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> Json:
    question = {"prompt": prompt} if isinstance(prompt, str) else {"messages": [dict(m) for m in prompt]}
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


def _raise_for(response: httpx.Response) -> None:
    if response.status_code < 400:
        return
    body = _object(response)
    if "error" not in body:
        raise _stranger(response)
    raise error_from(body["error"], response.status_code)


def _object(response: httpx.Response) -> Json:
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


def _events(chunks: Iterator[bytes]) -> Iterator[Json]:
    """Server-sent events until `[DONE]`. An error event is raised; so is an end without `[DONE]`."""
    for data in _event_data(chunks):
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise error_from(event["error"], 500)
        yield event
    raise ServiceUnreachable("The service closed the stream before the answer was complete.")


def _event_data(chunks: Iterator[bytes]) -> Iterator[str]:
    """The `data` of each event. Lines are split on bytes: a JSON text may hold U+2028 and its like."""
    rest, data = b"", list[str]()
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" ").decode())
            elif not line and data:
                yield "\n".join(data)
                data = []
