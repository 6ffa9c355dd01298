"""The client: finding the service, streams, errors."""

import asyncio
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import free_port

from radiance_mlx import client, errors
from radiance_mlx.client import Retry
from radiance_mlx.client.retrying import retry_after
from radiance_mlx.client.wire import EventReader, error_from


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No RADIANCE_… of the machine, no config.yaml of the repository."""
    for name in [name for name in os.environ if name.startswith("RADIANCE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


# --- which service --------------------------------------------------------------------------------------


def server_file(home: Path, url: str, pid: int) -> None:
    (home / "state").mkdir(parents=True, exist_ok=True)
    (home / "state" / "server.json").write_text(json.dumps({"url": url, "pid": pid, "started": "now"}))


def test_the_service_is_the_named_one_then_the_running_one_then_the_configured_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.yaml").write_text("server: {port: 8400, token: secret}")
    assert client.locate(home=home).url == "http://127.0.0.1:8400"
    server_file(home, "http://127.0.0.1:9000", os.getpid())
    assert client.locate(home=home).url == "http://127.0.0.1:9000"
    assert client.locate(home=home).token == "secret"
    monkeypatch.setenv("RADIANCE_URL", "http://127.0.0.1:9001/")
    assert client.locate(home=home).url == "http://127.0.0.1:9001"
    assert client.locate("localhost:9002", home=home).url == "http://localhost:9002"
    assert client.locate("localhost:9002", home=home, token="other").token == "other"
    assert "--url" in client.locate("localhost:9002").hint


def test_what_a_dead_process_left_behind_is_ignored(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    server_file(tmp_path, "http://127.0.0.1:9000", dead.pid)
    assert client.locate(home=tmp_path).url == "http://127.0.0.1:8321"
    (tmp_path / "state" / "server.json").write_text("{broken")
    assert client.locate(home=tmp_path).url == "http://127.0.0.1:8321"


def test_the_configured_token_never_goes_to_another_machine(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("server: {token: secret}")
    assert client.locate("https://example.org", home=tmp_path).token is None
    assert client.locate("http://localhost:1", home=tmp_path).token == "secret"


def test_a_server_bound_to_every_address_is_reached_on_loopback() -> None:
    assert client.configured_url("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert client.configured_url("::", 1) == "http://[::1]:1"
    assert client.configured_url("box.local", 1) == "http://box.local:1"


UNFIT: list[tuple[str, Any, str]] = [
    *(
        ("base_url", url, "the address of a service, such as http://127.0.0.1:8321")
        for url in ("", "http://", "ftp://x", "http://x:0x", "http://x:99999", "http://[", "a b", "http://x/?a=1", 5)
    ),
    ("api_key", 5, "the service's token"),
    *(("timeout", timeout, "seconds: a number above 0") for timeout in (0, -1.5, math.nan, math.inf, "5", None, True)),
    ("retry", 3, "a Retry, such as Retry(attempts=3)"),
    ("retry", None, "a Retry"),
    ("home", 5, "a path, or None"),
    ("home", "", "a path, or None"),
    ("config_file", 5, "a path, or None"),
    ("sleep", None, "a function"),
]


@pytest.mark.parametrize(("name", "given", "takes"), UNFIT, ids=[f"{name}={given!r}" for name, given, _ in UNFIT])
def test_what_a_client_cannot_be_made_with_is_named_with_what_it_takes(name: str, given: Any, takes: str) -> None:
    """When it is made, by both, and not at the first call."""
    for kind in (client.Client, client.AsyncClient):
        with pytest.raises(errors.ConfigError) as caught:
            kind(**{name: given})
        assert caught.value.message.startswith(name)
        assert f" takes {takes}" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *(("attempts", given) for given in (0, -1, 1.5, "3", True, None)),
        *((name, given) for name in ("first_s", "longest_s", "patience_s") for given in (-0.1, math.nan, "1", None)),
        ("absent", 1),
    ],
)
def test_a_retry_of_senseless_values_is_refused_by_their_name(name: str, given: Any) -> None:
    with pytest.raises(errors.ConfigError, match=f"{name} cannot be"):
        Retry(**{name: given})


def test_folders_may_be_named_by_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("server: {port: 8400}")
    for named in ({"home": str(tmp_path)}, {"config_file": str(tmp_path / "config.yaml")}):
        with client.Client(**named) as c:
            assert c.base_url == "http://127.0.0.1:8400"


# --- streams and errors ---------------------------------------------------------------------------------


def events_of(chunks: Iterator[bytes]) -> list[Any]:
    reader = EventReader()
    found = [event for chunk in chunks for event in reader.feed(chunk)]
    reader.finish()
    return found


def chunked(raw: bytes, size: int) -> Iterator[bytes]:
    return (raw[i : i + size] for i in range(0, len(raw), size))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_survives_any_cut_and_unusual_line_separators(size: int) -> None:
    answer = {"response": "ä\u2028b", "checkpoint": "base"}
    raw = f': ping\r\n\r\ndata: {{"text": "ä\u2028b"}}\r\n\r\ndata:{json.dumps(answer)}\n\ndata: [DONE]\n\n'
    assert events_of(chunked(raw.encode(), size)) == [{"text": "ä\u2028b"}, answer]


def test_an_error_inside_a_stream_is_raised_and_so_is_an_early_end() -> None:
    raw = b'data: {"text": "a"}\n\ndata: {"error": {"code": "busy", "message": "full"}}\n\n'
    with pytest.raises(errors.Busy, match="full"):
        events_of(iter([raw]))
    with pytest.raises(errors.ServiceUnreachable, match="before the answer was complete"):
        events_of(iter([b'data: {"text": "a"}\n\n']))


def test_an_error_of_the_service_comes_back_as_its_own_class() -> None:
    known = error_from({"code": "conflict", "message": "m", "hint": "h", "details": [1]}, 409)
    assert isinstance(known, errors.Conflict)
    assert (known.message, known.hint, known.details, known.status) == ("m", "h", [1], 409)
    unknown = error_from({"code": "martian", "message": "m"}, 500)
    assert (type(unknown), unknown.code) == (errors.RadianceError, "martian")


def test_no_service_says_which_address_and_how_to_start_one() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with client.Client(url, retry=Retry(absent=False)) as c, pytest.raises(errors.ServiceUnreachable) as caught:
        c.info()
    assert url in caught.value.message
    assert "python -m radiance_mlx run" in caught.value.hint
    with client.Client(url) as c:
        assert c.is_ready() is False


@pytest.fixture
def stranger() -> Iterator[str]:
    """Another program's web server."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/info" else 404)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_another_program_on_the_port_is_recognised(stranger: str) -> None:
    with client.Client(stranger) as c:
        for ask in (c.info, c.jobs):
            with pytest.raises(errors.RadianceError, match="is not this service") as caught:
                ask()
            assert caught.value.code == "bad_answer"


# --- what cannot be sent -----------------------------------------------------------------------------


@pytest.fixture
def recorder() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A server that notes path and Idempotency-Key of each request, and accepts everything."""
    seen: list[tuple[str, str | None]] = []

    class Page(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.path, self.headers.get("idempotency-key")))
            self.send_response(202)
            self.end_headers()
            self.wfile.write(b'{"job_id": "job_000001"}')

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_update_has_a_key_of_its_own_and_an_empty_one_is_sent(
    recorder: tuple[str, list[tuple[str, str | None]]],
) -> None:
    """The service refuses that; left out, a repetition would make another job."""
    url, seen = recorder
    with client.Client(url) as c:
        for key in ("", "ä", None, None):
            c.update([{"text": "a"}], idempotency_key=key)
    assert [key for _, key in seen[:2]] == ["", "ä".encode().decode("latin-1")]
    assert len({key for _, key in seen}) == 4
    assert all(len(key or "") > 20 for _, key in seen[2:])


def test_a_wait_that_fails_tells_the_job_and_the_key_of_what_was_accepted(
    recorder: tuple[str, list[tuple[str, str | None]]],
) -> None:
    with client.Client(recorder[0]) as c, pytest.raises(errors.RadianceError, match="accepted as job_000001") as caught:
        c.update([{"text": "a"}], wait=True)
    assert caught.value.details == {"job_id": "job_000001", "idempotency_key": recorder[1][0][1]}


def test_a_stream_is_asked_for_by_its_own_method() -> None:
    with client.Client(f"http://127.0.0.1:{free_port()}", retry=Retry(1)) as c:
        with pytest.raises(errors.InvalidRequest, match="Use search_stream"):
            c.search("hi", stream=True)
        with pytest.raises(errors.ServiceUnreachable):
            c.search_stream("hi", stream=True)


#: a call of either client, and what its fault says: the argument, what it is, what it takes
MISUSED: list[tuple[Callable[[Any], Any], str, str]] = [
    (lambda c: c.update([{"text": "a"}], wait=None), "wait is None", "wait takes True, False or a number of seconds"),
    (lambda c: c.update([{"text": "a"}], wait="5"), "wait is '5'", "wait takes True, False or a number of seconds"),
    (lambda c: c.update([{"text": "a"}], wait=math.nan), "wait is nan", "wait takes True, False or a number"),
    (lambda c: c.update([{"text": "a"}], idempotency_key=5), "idempotency_key is 5", "idempotency_key takes text"),
    (lambda c: c.update([{"text": "a"}], tags=None), "tags is None", "tags takes a list of texts"),
    (lambda c: c.update([{"text": "a"}], tags="alice"), "tags is 'alice'", "tags takes a list of texts"),
    (lambda c: c.update([{"text": "a"}], wait=True, on_progress=1), "on_progress is 1", "on_progress takes a function"),
    (lambda c: c.update(5), "examples is 5", "examples takes a list of rows"),
    (lambda c: c.update("text"), "examples is 'text'", "examples takes a list of rows"),
    (lambda c: c.update([{"text": "a"}, 5]), "examples[1] is 5", "examples[1] takes a mapping"),
    (lambda c: c.search(5), "prompt is 5", "prompt takes text, or a list of chat messages"),
    (lambda c: c.search(None), "prompt is None", "prompt takes text, or a list of chat messages"),
    (lambda c: c.search(["hi"]), "prompt[0] is 'hi'", "prompt[0] takes a mapping"),
    (lambda c: c.wait("job_000001", timeout="5"), "timeout is '5'", "timeout takes None or a number of seconds"),
    (lambda c: c.job(5), "the id is 5", "the id takes text"),
    (lambda c: c.jobs(5), "the state is 5", "the state takes text"),
    (lambda c: c.evaluate(5), "checkpoints is 5", "checkpoints takes a list of checkpoints"),
    (lambda c: c.evaluate("A_1"), "checkpoints is 'A_1'", "checkpoints takes a list of checkpoints"),
]


@pytest.mark.parametrize(("ask", "told", "takes"), MISUSED, ids=[told for _, told, _ in MISUSED])
def test_an_argument_of_a_wrong_type_is_named_with_what_it_takes_and_nothing_is_sent(
    recorder: tuple[str, list[tuple[str, str | None]]], ask: Callable[[Any], Any], told: str, takes: str
) -> None:
    """By both clients, and not by Python from somewhere within."""
    url, seen = recorder

    async def with_asyncio() -> None:
        async with client.AsyncClient(url) as c:
            await ask(c)

    with client.Client(url) as c:
        for misused in (lambda: ask(c), lambda: asyncio.run(with_asyncio())):
            with pytest.raises(errors.InvalidRequest) as caught:
                misused()
            assert f"cannot be sent: {told}." in caught.value.message
            assert takes in caught.value.hint
    assert seen == []


@pytest.mark.parametrize("patience_s", [60.0, math.inf])
@pytest.mark.parametrize(
    ("header", "after_s"),
    [
        ("1e300", 1e300),
        ("9" * 400, math.inf),
        ("-inf", 0.0),
        ("nan", None),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
        ("Mon, 01 Jan 2030 00:00:00 +99999999999999999", None),
    ],
)
def test_a_retry_after_that_is_no_time_to_wait_does_no_harm(
    header: str, after_s: float | None, patience_s: float
) -> None:
    """Nobody waits for ever, whatever the patience; without a sensible one the client's own wait counts."""
    found = retry_after(httpx.Response(503, headers={"retry-after": header}))
    assert found == after_s
    wait_s = Retry(patience_s=patience_s).wait_s(1, found, lambda: 0.0)
    assert wait_s == (None if after_s else 0.25)


def test_a_wait_is_not_doubled_beyond_what_a_number_holds() -> None:
    assert Retry(attempts=10_000).wait_s(5_000, None, lambda: 0.0) == 8.0


def test_what_json_in_utf_8_cannot_hold_is_named_and_not_sent() -> None:
    """NaN, infinity and bytes that are no text, wherever they stand; no service is needed to say so."""
    with client.Client(f"http://127.0.0.1:{free_port()}") as c:
        for ask, field in (
            (lambda: c.search("hi", temperature=float("nan")), "temperature"),
            (lambda: c.search("\udcff"), "prompt"),
            (lambda: list(c.search_stream("hi", top_p=float("inf"), stop=["\udcff"])), "top_p"),
            (lambda: c.update([{"text": "a"}, {"text": "\ud800"}]), "examples.1.text"),
            (lambda: c.update([{"text": "a"}], tags=["\udcff"]), "tags.0"),
            (lambda: c.rollback("base", "\udcff"), "reason"),
            (lambda: c.evaluate(against="\udcff"), "against"),
        ):
            with pytest.raises(errors.InvalidRequest, match="cannot be sent") as caught:
                ask()
            assert caught.value.details[0]["field"] == field
        for ask in (
            lambda: c.update([{"text": "a"}], idempotency_key="\udcff"),
            lambda: c.jobs(state="\udcff"),
            lambda: c.job("\udcff"),
            lambda: c.job(""),
            lambda: c.cancel(""),
            lambda: c.checkpoint("\udcff"),
        ):
            with pytest.raises(errors.InvalidRequest, match="cannot be sent"):
                ask()
