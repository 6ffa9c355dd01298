"""The HTTP contract, over a real port: shapes of answers, and the description of it all."""

import json
import re
from dataclasses import replace

from running import FACTS, REFUSALS, until
from served import GREEDY, JSON, error, search, update
from served import client as client
from served import started as started

from radiance_mlx.api.app import make_app
from radiance_mlx.api.openapi import shown
from radiance_mlx.api.responses import job_body

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


def test_it_is_ready_once_it_can_answer(client):
    assert client.get("/readyz").json() == {"status": "ready"}


def test_a_job_that_is_being_stopped_says_so(started):
    job = started.service.job("job_000001")
    wished = replace(job, state="training", cancel_requested=True)
    assert any("cancelled" in note for note in job_body(wished, None)["notes"])
    assert job_body(replace(wished, state="cancelled"), None)["notes"] == list(job.notes)


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
