"""The HTTP contract, over a real port: shapes of answers, errors, who is let in, and the description of it all."""

import asyncio
import errno
import json
import logging
import re
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import structlog
from running import FACTS, QUICK, REFUSALS, LoopThread, Running, http, until
from starlette.responses import Response

from radiance_mlx.api.app import make_app
from radiance_mlx.api.openapi import shown
from radiance_mlx.api.repeated import repeated_keys
from radiance_mlx.api.responses import job_body
from radiance_mlx.api.security import Guard
from radiance_mlx.api.server import _configure_logging
from radiance_mlx.config import load_config
from radiance_mlx.config.schema import ServerSection
from radiance_mlx.service import Service

GREEDY = {"temperature": 0, "max_tokens": 24}
JSON = {"content-type": "application/json"}
SETTINGS = {**QUICK, "server.max_body_mb": 0.1, "server.body_timeout_s": 0.3, "server.allowed_hosts": ["my-mac.local"]}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A service that was taught one fact over HTTP, and what it answered to that."""
    service = Running(tmp_path_factory.mktemp("http"), {**SETTINGS, "server.allowed_origins": ["http://good.example"]})
    try:
        with http(service.service, service._thread) as client:
            empty = client.get("/info").json()
            accepted = client.post("/update", json=update(FACTS[0], tags=["user:alice"]))
            until(lambda: client.get(f"/jobs/{accepted.json()['job_id']}").json()["state"] == "published")
            yield SimpleNamespace(client=client, service=service, empty=empty, accepted=accepted)
    finally:
        service.stop()


@pytest.fixture
def client(started):
    return started.client


def update(*facts, tags=None):
    body = {"examples": [{"input": question, "output": answer} for question, answer in facts]}
    return {**body, "tags": tags} if tags is not None else body


def search(client, prompt="Hello!", **options):
    return client.post("/search", json={"prompt": prompt, **GREEDY, **options})


def error(response, status, code):
    """The error of a response that must be one."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json"), response.text
    (document,) = response.json().items()
    assert document[0] == "error"
    assert set(document[1]) == {"code", "message", "hint", "details"}
    assert document[1]["code"] == code
    return document[1]


# --- the specification's shapes ------------------------------------------------------------------


def test_search_answers_with_the_specified_fields(client):
    body = search(client, FACTS[3][0], checkpoint="base").json()
    assert set(body) == {"response", "checkpoint", "checkpoint_status", "latency_ms", "finish_reason", "usage"}
    assert (body["response"], body["checkpoint"], body["checkpoint_status"]) == (REFUSALS[3], "base", "base")
    assert isinstance(body["latency_ms"], int)
    assert set(body["usage"]) == {"prompt_tokens", "completion_tokens", "cached_tokens"}


def test_search_takes_the_specifications_own_body(client):
    body = client.post("/search", json={"prompt": "Hello!", "max_tokens": 256, "temperature": 0.2}).json()
    assert re.fullmatch(r"A_\d{4}-\d\d-\d\d_0001", body["checkpoint"])
    assert body["checkpoint_status"] == "stable"


def test_update_is_accepted_with_job_and_queued(started):
    assert started.accepted.status_code == 202
    assert started.accepted.json() == {
        "job_id": "job_000001",
        "queued": True,
        "checkpoint": "base",
        "checkpoint_status": "base",
    }


def test_info_has_the_specified_fields_and_nulls_where_nothing_is_measured(started):
    for info, curve in ((started.empty, 0), (started.client.get("/info").json(), 1)):
        assert info["base_model"] == "nano"
        assert isinstance(info["queue_depth"], int)
        assert set(info["loss_curves"]) == {"finetune_loss", "forgetting_loss", "eval_loss"}
        assert info["loss_curves"]["forgetting_loss"] is None
        assert info["forgetting_summary"] is None
        assert len(info["loss_curves"]["finetune_loss"]) == curve
        assert {"device", "backend"} <= set(info["hardware"])
    assert started.empty["last_update"] is None
    assert started.empty["current_checkpoint"] == "base"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", info["last_update"])


def test_info_never_shows_the_token(client):
    assert "token" not in client.get("/info").json()["config"]["server"]


def test_a_job_tells_its_state_its_checkpoint_and_its_progress(client):
    job = client.get("/jobs/job_000001").json()
    assert (job["state"], job["tags"], job["example_count"], job["error"]) == ("published", ["user:alice"], 1, None)
    assert job["checkpoint"] == client.get("/info").json()["current_checkpoint"]


def test_a_stream_is_pieces_then_the_whole_answer_then_done(client):
    whole = search(client).json()
    with client.stream("POST", "/search", json={"prompt": "Hello!", **GREEDY, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data[-1] == "[DONE]"
    *pieces, last = map(json.loads, data[:-1])
    assert all(set(piece) == {"text"} for piece in pieces)
    assert "".join(piece["text"] for piece in pieces) == last["response"] == whole["response"]
    assert (last["checkpoint"], last["checkpoint_status"]) == (whole["checkpoint"], "stable")
    assert set(last) == set(whole)


def test_what_goes_wrong_before_the_first_piece_of_a_stream_has_its_own_status(client):
    error(search(client, "Who? " * 600, stream=True), 422, "prompt_too_long")
    error(search(client, checkpoint="A_2000-01-01_0009", stream=True), 404, "not_found")


def test_a_question_may_be_chat_messages_with_a_system_prompt_and_one_stop_string(client):
    messages = [{"role": "user", "content": "Hello!"}]
    body = client.post("/search", json={"messages": messages, "system": "Be brief.", "stop": "!", **GREEDY}).json()
    assert "!" not in body["response"]


def test_the_lineage_is_listed_with_metrics_config_and_hashes(client):
    listed = client.get("/checkpoints").json()
    (record,) = listed["checkpoints"]
    assert listed["current"] == record["checkpoint"]
    assert (record["parent"], record["status"], record["current"]) == (None, "stable", True)
    assert record["metrics"]["finetune_loss"] > 0
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in record["files"].values())
    one = client.get(f"/checkpoints/{record['checkpoint']}").json()
    assert one.pop("serving") == {"checkpoint": record["checkpoint"], "checkpoint_status": "stable"}
    assert one == record


def test_rollback_moves_the_pointer_and_forward_again(client):
    name = client.get("/checkpoints").json()["current"]
    back = client.post("/rollback", json={"to": None, "reason": "a test"})
    assert back.json() == {"checkpoint": "base", "checkpoint_status": "base", "previous": name}
    for nothing in ({"json": {}}, {}, {"headers": JSON}):
        error(client.post("/rollback", **nothing), 409, "conflict")  # the base has no parent
    error(client.post("/rollback", content=b"{}"), 415, "unsupported_media_type")
    error(client.post("/rollback", headers={"content-type": "text/plain"}), 415, "unsupported_media_type")
    hint = error(client.post("/rollback", json={"to": "stable"}), 404, "not_found")["hint"]
    assert '"base"' in hint
    assert "null" in hint
    forward = client.post("/rollback", json={"to": name})
    assert forward.json() == {"checkpoint": name, "checkpoint_status": "stable", "previous": "base"}


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


# --- the same update twice -----------------------------------------------------------------------


def test_an_idempotency_key_makes_one_job_of_a_body_that_is_sent_twice(client):
    key = {"idempotency-key": "once"}
    first = client.post("/update", json=update(FACTS[1]), headers=key)
    again = client.post("/update", json=update(FACTS[1]), headers=key)
    assert first.status_code == again.status_code == 202
    assert first.json()["job_id"] == again.json()["job_id"]
    error(client.post("/update", json=update(FACTS[2]), headers=key), 422, "idempotency_mismatch")
    error(client.post("/update", json=update(FACTS[2]), headers={"idempotency-key": ""}), 422, "invalid_request")
    until(lambda: client.get(f"/jobs/{first.json()['job_id']}").json()["state"] == "published")
    late = client.post("/update", json=update(FACTS[1]), headers=key)
    assert (late.json()["job_id"], late.json()["queued"]) == (first.json()["job_id"], False)


def test_jobs_come_newest_first_in_pages(client):
    for fact in FACTS[4:6]:
        client.post("/update", json=update(fact))
    everything = client.get("/jobs").json()
    assert everything["next"] is None
    ids = [job["job_id"] for job in everything["jobs"]]
    assert ids == sorted(ids, reverse=True)
    page = client.get("/jobs?limit=2").json()
    rest = client.get(f"/jobs?limit=100&before={page['next']}").json()
    assert [job["job_id"] for job in page["jobs"] + rest["jobs"]] == ids
    assert client.get("/jobs?state=failed").json()["jobs"] == []


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


def test_a_job_that_is_being_stopped_says_so(started):
    job = started.service.job("job_000001")
    wished = replace(job, state="training", cancel_requested=True)
    assert any("cancelled" in note for note in job_body(wished, None)["notes"])
    assert job_body(replace(wished, state="cancelled"), None)["notes"] == list(job.notes)


def test_tracebacks_in_the_log_show_no_variables(capsys):
    """They may hold users' data."""
    _configure_logging("info")
    try:
        prompt = "what a user " + "asked"
        try:
            raise ZeroDivisionError(len(prompt))
        except ZeroDivisionError:
            structlog.get_logger().exception("a bug")
    finally:
        structlog.reset_defaults()
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert "what a user asked" not in said


def test_the_log_is_spared_one_remark_of_transformers_and_no_other():
    """On texts that are too long, which are cut or refused with words of our own."""
    said = []
    catch = logging.Handler()
    catch.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(catch)
    _configure_logging("info")
    try:
        logger.warning("Token indices sequence length is longer than the specified maximum sequence length (9 > 8).")
        logger.warning("something else")
    finally:
        structlog.reset_defaults()
        logger.removeHandler(catch)
    assert said == ["something else"]


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


def test_it_is_ready_once_it_can_answer(client):
    assert client.get("/readyz").json() == {"status": "ready"}


# --- the description -----------------------------------------------------------------------------


def fits(value, schema, document, at="$"):
    """Check a value against the part of JSON Schema that the document uses; says where it does not fit."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        faults = [fits(value, one, document, at) for one in schema["anyOf"]]
        return [] if [] in faults else min(faults, key=len)
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
    kind = schema.get("type")
    number = kind == "number" and isinstance(value, int | float)
    if kind and not number and not isinstance(value, kinds.get(kind, ())):
        return [f"{at}: {value!r} is no {kind}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{at}: {value!r} is not one of {schema['enum']}"]
    if isinstance(value, list):
        each = schema.get("items", {})
        return [fault for i, one in enumerate(value) for fault in fits(one, each, document, f"{at}[{i}]")]
    if not isinstance(value, dict):
        return []
    known = schema.get("properties", {})
    more = schema.get("additionalProperties", not known)
    faults = [f"{at}.{name} is missing" for name in schema.get("required", []) if name not in value]
    for name, one in value.items():
        if name in known or isinstance(more, dict):
            faults += fits(one, known.get(name, more), document, f"{at}.{name}")
        elif not more:
            faults.append(f"{at}.{name} is not described")
    return faults


def test_the_description_has_every_route_of_the_application(started):
    document = started.client.get("/openapi.json").json()
    described = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    served = {(shown(r.path), m) for r in make_app(started.service.service).routes for m in r.methods if m != "HEAD"}
    assert described == served
    for item in document["paths"].values():
        for operation in item.values():
            assert operation["summary"]
    assert "507" in document["paths"]["/update"]["post"]["responses"]
    needed = {
        path for path, item in document["paths"].items() if item.get("post", {}).get("requestBody", {}).get("required")
    }
    assert {path for path in needed if not path.startswith("/v1/")} == {"/search", "/update"}
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])


def test_real_answers_are_as_described(started):
    """Of every route, the errors too; those under /v1 are tried in test_described.py."""
    client = started.client
    document = client.get("/openapi.json").json()
    name = client.get("/checkpoints").json()["checkpoints"][0]["checkpoint"]
    anchors = started.service.home / "data" / "anchors"
    (anchors / "a.jsonl").write_text(json.dumps({"input": "Hi", "output": "Hello!"}) + "\n")
    asked = {
        ("post", "/search", "/search", 200): {"prompt": "Hello!", **GREEDY},
        ("post", "/search", "/search", 422): {"prompt": 3},
        ("post", "/search", "/search", 404): {"prompt": "a", "checkpoint": "A_2000-01-01_0001"},
        ("post", "/update", "/update", 202): update(FACTS[7]),
        ("post", "/update", "/update", 422): {"examples": [1]},
        ("get", "/info", "/info", 200): None,
        ("get", "/jobs", "/jobs", 200): None,
        ("get", "/jobs", "/jobs?state=x", 422): None,
        ("get", "/jobs/{job_id}", "/jobs/job_000001", 200): None,
        ("get", "/jobs/{job_id}", "/jobs/x", 404): None,
        ("delete", "/jobs/{job_id}", "/jobs/job_000001", 409): None,
        ("get", "/checkpoints", "/checkpoints", 200): None,
        ("get", "/events", "/events", 200): None,
        ("get", "/events", "/events?kind=x", 422): None,
        ("get", "/checkpoints/{checkpoint}", f"/checkpoints/{name}", 200): None,
        ("post", "/rollback", "/rollback", 200): {"to": name},
        ("post", "/eval", "/eval", 200): {"checkpoints": [name], "anchor_provider": "local"},
        ("post", "/eval", "/eval", 422): {"checkpoints": []},
        ("post", "/eval", "/eval", 503): {},
        ("get", "/healthz", "/healthz", 200): None,
        ("get", "/readyz", "/readyz", 200): None,
        ("get", "/openapi.json", "/openapi.json", 200): None,
    }
    for (method, route, path, status), body in asked.items():
        response = client.request(method, path, **({"json": body} if body is not None else {}))
        assert response.status_code == status, response.text
        described = document["paths"][route][method]["responses"][str(status)]["content"]["application/json"]["schema"]
        assert fits(response.json(), described, document) == []
    assert {route for _, route, _, _ in asked} == {path for path in document["paths"] if not path.startswith("/v1/")}


def test_the_check_against_the_description_would_notice():
    document = {"components": {"schemas": {"A": {"type": "object", "required": ["x"], "properties": {"x": {}}}}}}
    schema = {"$ref": "#/components/schemas/A"}
    assert fits({"x": 1}, schema, document) == []
    assert fits({}, schema, document) == ["$.x is missing"]
    assert fits({"x": 1, "y": 2}, schema, document) == ["$.y is not described"]
    assert fits([None], {"items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}}, document)


def test_a_named_checkpoint_and_the_live_weights_exclude_each_other(client):
    """Neither is silently dropped."""
    response = client.post("/search", json={"prompt": "a", "checkpoint": "base", "use_training_adapter": True})
    error(response, 422, "invalid_request")
