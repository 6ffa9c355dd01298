"""What HTTP refuses, each with a code of its own: requests that cannot be served, and who may not talk to it."""

import asyncio
import errno
import socket

import pytest
from running import FACTS, LoopThread, http, until
from served import JSON, error, search, update
from served import client as client
from served import started as started
from starlette.responses import Response

from radiance_mlx.api.repeated import repeated_keys
from radiance_mlx.api.security import Guard
from radiance_mlx.config import load_config
from radiance_mlx.config.schema import ServerSection
from radiance_mlx.service import Service

# --- requests that cannot be served --------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b'{"prompt": "a"', JSON, 400, "malformed_body"),
        (b"", JSON, 400, "malformed_body"),
        (b'{"prompt": "\xff"}', JSON, 400, "malformed_body"),
        (b'{"prompt": "\\ud800"}', JSON, 400, "malformed_body"),
        (b'{"prompt": ' + b"[" * 50_000, JSON, 400, "malformed_body"),
        (b'{"prompt": "a"}', {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b'{"prompt": "a"}', {}, 415, "unsupported_media_type"),
        (b"[]", JSON, 422, "invalid_request"),
        (b"null", JSON, 422, "invalid_request"),
        (b'{"prompt": "a", "max_token": 3}', JSON, 422, "invalid_request"),
        (b'{"prompt": ""}', JSON, 422, "invalid_request"),
        (b"{}", JSON, 422, "invalid_request"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', JSON, 422, "invalid_request"),
        (b'{"prompt": "a", "temperature": NaN}', JSON, 422, "invalid_request"),
        (b'{"prompt": "a", "temperature": -1}', JSON, 422, "invalid_request"),
        (b'{"prompt": "a", "max_tokens": 0}', JSON, 422, "invalid_request"),
        (b'{"prompt": "a", "max_tokens": 1e999}', JSON, 422, "invalid_request"),
        (b'{"prompt": "a", "seed": -1}', JSON, 422, "invalid_request"),
        (b'{"prompt": "' + b"a" * 200_000 + b'"}', JSON, 413, "payload_too_large"),
    ],
    ids=lambda value: value[:40].decode(errors="replace") if isinstance(value, bytes) else None,
)
def test_a_body_that_cannot_be_used_is_refused_with_its_own_code(client, body, headers, status, code):
    error(client.post("/search", content=body, headers=headers), status, code)


def test_an_unknown_field_is_named(client):
    fault = error(search(client, max_token=3), 422, "invalid_request")
    assert fault["details"] == [{"field": "max_token", "problem": "Extra inputs are not permitted"}]


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/update", b'{"examples": [{"text": "a"}], "examples": [{"text": "b"}]}', ["examples"]),
        ("/update", b'{"examples": [{"text": "a"}, {"text": "b", "t\\u0065xt": "c"}]}', ["examples.1.text"]),
        (
            "/update",
            b'{"examples": [{"messages": [{"role": "user", "role": "user", "content": "a"}, {"role": "assistant", '
            b'"content": "b", "content": "c"}]}], "tags": ["x"], "tags": []}',
            ["tags", "examples.0.messages.0.role", "examples.0.messages.1.content"],
        ),
        ("/search", b'{"prompt": "a", "prompt": "b"}', ["prompt"]),
        ("/search", b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', ["messages.0.content"]),
        ("/rollback", b'{"to": "base", "to": "base"}', ["to"]),
        ("/eval", b'{"checkpoints": [], "checkpoints": null}', ["checkpoints"]),
    ],
)
def test_a_key_that_is_there_more_than_once_is_refused_by_its_place(started, path, body, fields):
    """One of its values would be lost in silence. Nothing is done, in whatever spelling it comes again."""
    before = started.client.get("/jobs").json()
    fault = error(started.client.post(path, content=body, headers=JSON), 422, "invalid_request")
    assert fault["details"] == [{"field": field, "problem": "is there more than once"} for field in fields]
    assert fields[0] in fault["message"]
    assert started.client.get("/jobs").json() == before


def test_repeated_keys_are_looked_for_in_whatever_the_bodies_parser_takes():
    """Numbers of any length, and text that Python's parser alone would refuse."""
    assert repeated_keys(b'{"a": [' + b"9" * 5000 + b', 1e999], "b": NaN}') == []
    assert repeated_keys(b'{"a": ' + b"9" * 5000 + b', "a": 1}') == [("a",)]
    assert repeated_keys(b'{"a": "line\nbreak", "a": 1}') == [("a",)]


def test_several_faults_are_told_at_once(client):
    fault = error(search(client, temperature=-1, top_p=2), 422, "invalid_request")
    assert {detail["field"] for detail in fault["details"]} == {"temperature", "top_p"}


def test_a_named_checkpoint_and_the_live_weights_exclude_each_other(client):
    """Neither is silently dropped."""
    response = client.post("/search", json={"prompt": "a", "checkpoint": "base", "use_training_adapter": True})
    error(response, 422, "invalid_request")


def test_a_content_type_with_a_charset_is_json_too(client):
    headers = {"content-type": "application/json; charset=utf-8"}
    assert client.post("/search", content=b'{"prompt": "Hello!", "max_tokens": 2}', headers=headers).status_code == 200


def test_every_bad_example_is_named_and_nothing_is_stored(started):
    client, home = started.client, started.service.home
    before = (client.get("/jobs").json(), sorted((home / "data" / "raw").iterdir()))
    rows = [
        {"input": "a", "output": "b"},
        {"input": "a"},
        "text",
        {"question": "a"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        {"text": ""},
        {"prompt": "a", "completion": "b", "weight": 2},
        {"input": 5, "output": None},
    ]
    fault = error(client.post("/update", json={"examples": rows}), 422, "invalid_request")
    assert [detail["example"] for detail in fault["details"]] == [1, 2, 3, 4, 5, 6, 7]
    assert all(problem["problem"] for detail in fault["details"] for problem in detail["problems"])
    assert {problem["field"] for problem in fault["details"][-1]["problems"]} == {"input", "output"}
    assert (client.get("/jobs").json(), sorted((home / "data" / "raw").iterdir())) == before


@pytest.mark.parametrize("body", [{"examples": []}, {}, {"examples": "a"}, {"examples": [{"text": "a"}], "tag": []}])
def test_an_update_without_examples_or_with_unknown_fields_is_refused(client, body):
    error(client.post("/update", json=body), 422, "invalid_request")


def test_a_body_without_a_length_is_bounded_too(client):
    chunks = (b" " * 10_000 for _ in range(20))
    error(client.post("/update", content=chunks, headers=JSON), 413, "payload_too_large")


def test_an_evaluation_needs_no_body(client):
    error(client.post("/eval"), 503, "anchors_unavailable")


def raw(client, head, *, wait=True):
    """Speak HTTP by hand: what httpx would not send. The answer, or the open socket."""
    connection = socket.create_connection(("127.0.0.1", client.base_url.port), timeout=30)
    connection.sendall(head)
    if not wait:
        return connection
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_body_that_does_not_come_times_out(client):
    head = b"POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    answer = raw(client, head + b"content-length: 100\r\nconnection: close\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_hangs_up_ends_its_generation(started, stream):
    body = b'{"prompt": "Hello!", "max_tokens": 490, "temperature": 8, "seed": 3, "stream": %s}' % stream.encode()
    head = b"POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    connection = raw(started.client, head % len(body) + body, wait=False)

    def active():
        return started.service.engine(lambda engine: engine.status())["active"]

    until(lambda: active() == 1)
    drawn = started.service.engine(lambda engine: next(iter(engine._decoder._active.values())))
    connection.close()
    until(lambda: active() == 0)
    assert drawn.drawn < 490


def test_an_unknown_route_or_method_is_told_in_json(client):
    hint = error(client.get("/serach"), 404, "not_found")["hint"]
    assert hint == "Is /search meant? GET /openapi.json lists all."
    assert "/openapi.json" in hint
    response = client.get("/search")
    error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    error(client.get("/jobs/job_999999"), 404, "not_found")
    error(client.get("/checkpoints/..%2f..%2fetc"), 404, "not_found")


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=1001", "before=-1", "state=sleeping"])
def test_a_bad_parameter_is_named(client, query):
    assert query.split("=")[0] in error(client.get(f"/jobs?{query}"), 422, "invalid_request")["message"]


def test_a_published_job_cannot_be_cancelled(client):
    assert "roll back" in error(client.delete("/jobs/job_000001"), 409, "conflict")["hint"]
    error(client.delete("/jobs/job_999999"), 404, "not_found")


def test_a_bug_is_answered_without_its_text(started, monkeypatch):
    def broken(self):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Service, "info", broken)
    response = started.client.get("/info")
    error(response, 500, "internal_error")
    assert "secret" not in response.text


def no_files(service, monkeypatch, number):
    def full(*_):
        raise OSError(number, "no room")

    monkeypatch.setattr("radiance_mlx.store.acceptance.write_unpublished", full)


def no_pages(service, monkeypatch, number):
    """SQLite's own limit: the database cannot grow, as on a full disk."""
    service.store(lambda s: s._database._connection.execute("PRAGMA max_page_count=1"))


@pytest.mark.parametrize(
    ("fill", "number"),
    [(no_files, errno.ENOSPC), (no_files, errno.EDQUOT), (no_pages, None)],
    ids=["files", "quota", "database"],
)
def test_an_update_that_a_full_disk_does_not_take_is_told_and_loses_nothing(started, monkeypatch, fill, number):
    """The same update is taken once there is room, with the number that it would have had."""
    client, service = started.client, started.service
    before = client.get("/jobs").json()["jobs"]
    body = update(*[(question, "a" * 4000) for question, _ in FACTS[:2]])
    with monkeypatch.context() as patch:
        fill(service, patch, number)
        response = client.post("/update", json=body)
    service.store(lambda s: s._database._connection.execute("PRAGMA max_page_count=1000000"))
    fault = error(response, 507, "disk_full")
    assert "room" in fault["hint"]
    assert [job["job_id"] for job in client.get("/jobs").json()["jobs"]] == [job["job_id"] for job in before]
    taken = client.post("/update", json=body)
    assert (taken.status_code, taken.json()["job_id"]) == (202, f"job_{len(before) + 1:06d}")
    client.delete(f"/jobs/{taken.json()['job_id']}")  # what it teaches is not the point


# --- who may talk to it --------------------------------------------------------------------------

ROUTES = [("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/info"), ("POST", "/search"), ("POST", "/update")]
ROUTES += [("GET", "/jobs"), ("DELETE", "/jobs/job_000001"), ("GET", "/openapi.json"), ("GET", "/nothing")]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_host_that_is_not_ours_is_refused_on_every_route(client, method, path):
    """DNS rebinding: a name of somebody else's that points here."""
    for host in ("evil.example", "127.evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "[evil]", ""):
        error(client.request(method, path, headers={"host": host}, json={}), 403, "forbidden")


OURS = ["localhost", "LOCALHOST:8321", "127.0.0.1:1", "127.8.8.8", "[::1]:8321", "My-Mac.local"]


@pytest.mark.parametrize("host", OURS)
def test_names_of_this_machine_and_listed_ones_are_let_in(client, host):
    assert client.get("/healthz", headers={"host": host}).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("local", "host", "status"),
    [
        ("192.168.1.5", "192.168.1.5:8321", 204),
        ("192.168.1.5", "192.168.1.6:8321", 403),
        ("::ffff:192.168.1.5", "192.168.1.5", 204),
        ("fd00::5", "[fd00::5]:8321", 204),
        ("fd00::5", "[fd00::6]:8321", 403),
        (None, "", 403),
    ],
)
def test_the_address_that_was_connected_to_is_let_in(local, host, status):
    """With server.host 0.0.0.0 it cannot be listed beforehand."""

    async def app(scope, receive, send):
        await Response(status_code=204)(scope, receive, send)

    async def send(message):
        sent.append(message)

    sent = []
    scope = {"type": "http", "path": "/info", "headers": [(b"host", host.encode())], "method": "GET"}
    scope["server"] = local and (local, 8321)
    asyncio.run(
        Guard(app, ServerSection(host="0.0.0.0", token="a"))(
            {**scope, "headers": [*scope["headers"], (b"authorization", b"Bearer a")]}, None, send
        )
    )
    assert sent[0]["status"] == status


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://good.example", ""])
def test_a_web_page_from_elsewhere_is_refused(client, origin):
    for method, path in ROUTES:
        response = client.request(method, path, headers={"origin": origin}, json={})
        error(response, 403, "forbidden")
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_our_own_pages_and_listed_origins_are_let_in_without_cors(client):
    own = str(client.base_url).rstrip("/")
    for origin in (own, "http://good.example"):
        response = client.get("/info", headers={"origin": origin})
        assert response.status_code == 200
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A service with a token, whose model is not loaded yet."""
    loop = LoopThread()
    flags = {"server.token": "s3cret", "server.port": 0}
    service = Service(load_config(home=tmp_path_factory.mktemp("guarded"), flags=flags, environ={}))
    service.open()
    try:
        with http(service, loop) as client:
            yield client
    finally:
        loop.call(service.stop())
        loop.close()


def test_before_the_model_is_there_the_process_is_healthy_and_not_ready(guarded):
    assert (guarded.get("/healthz").status_code, guarded.get("/healthz").json()) == (200, {"status": "ok"})
    assert (guarded.get("/readyz").status_code, guarded.get("/readyz").json()) == (503, {"status": "not ready"})
    headers = {"authorization": "Bearer s3cret"}
    for response in (
        guarded.get("/info", headers=headers),
        guarded.post("/search", json={"prompt": "a"}, headers=headers),
        guarded.post("/update", json=update(FACTS[0]), headers=headers),
    ):
        error(response, 503, "not_ready")
        assert response.headers["retry-after"]


@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer wrong", "s3cret", "Basic s3cret", "Bearer s3cret x", "Bearer s3crét"]
)
def test_without_the_token_nothing_but_health_is_told(guarded, given):
    headers = {"authorization": given.encode()} if given else {}
    for path in ("/info", "/openapi.json", "/nothing"):
        response = guarded.get(path, headers=headers)
        error(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"


def test_with_the_token_one_is_let_in(guarded):
    for scheme in ("Bearer", "bearer"):
        assert guarded.get("/openapi.json", headers={"authorization": f"{scheme} s3cret"}).status_code == 200
