"""schemathesis over `/openapi.json`, on a running service: no 5xx, no answer outside its description."""

import json
import re
from types import SimpleNamespace

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from running import FACTS, QUICK, REPOSITORY, http, running
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from radiance_mlx.api.openapi import document

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)
PATHS = {path: item for path, item in document()["paths"].items() if path != "/openapi.json"}
OPERATIONS = [(method.upper(), path) for path, item in PATHS.items() for method in item]
#: those that can be asked for what their description forbids: by a body, or by parameters beside the path
ASKING = {
    (method.upper(), path)
    for path, item in PATHS.items()
    for method, operation in item.items()
    if "requestBody" in operation or any(one["in"] == "query" for one in operation["parameters"])
}
EXAMPLES = 8
#: rows of every form, right and wrong ones, take seconds to make
FEWER = {("POST", "/update"): 4}
#: statuses of 5xx that are described: nothing is at fault with the service
EXPECTED = {("POST", "/eval"): {503}}  # no anchors are configured, and no hub can be reached


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A service that has something of everything, its description, and ids of what there is by parameter."""
    settings = {**QUICK, "update_mode": "batched", "serving.max_context": 96, "server.max_body_mb": 0.2}
    home = tmp_path_factory.mktemp("described")
    with running(home, settings) as service, http(service.service, service._thread) as client:
        row = {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), FACTS[0], strict=True)]}
        upload = {"files": {"file": ("a.jsonl", json.dumps(row).encode())}, "data": {"purpose": "fine-tune"}}
        file = client.post("/v1/files", **upload).json()["id"]
        asked = {"model": "stable", "training_file": file, "hyperparameters": {"n_epochs": 1}, "validation_file": file}
        tuning = client.post("/v1/fine_tuning/jobs", json=asked).json()
        checkpoint = service.wait(tuning["job_id"], "published").checkpoint
        known = {"/v1/": {"file_id": file, "job_id": tuning["id"], "model": checkpoint}}
        known["/"] = {"job_id": tuning["job_id"], "checkpoint": checkpoint}
        schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
        yield SimpleNamespace(client=client, schema=schema, known=known)


HELLO = {"messages": [{"role": "user", "content": "Hello!"}]}
STREAMS = {
    "/search": {"prompt": "Hello!"},
    "/v1/chat/completions": {"model": "stable", **HELLO, "logprobs": True, "top_logprobs": 1, "n": 2},
    "/v1/completions": {"model": "stable", "prompt": "Hello!", "logprobs": 1},
}


def names_in(described, path):
    """Parameters of the path with values that name something."""
    known = described.known["/v1/" if path.startswith("/v1/") else "/"]
    return {name: value for name, value in known.items() if f"{{{name}}}" in path}


def tried(described, method, path, case):
    """Send it and look at the answer."""
    checks = [check for check in CHECKS if not (check is not_a_server_error and (method, path) in EXPECTED)]
    response = case.call(base_url=str(described.client.base_url), timeout=20)
    case.validate_response(response, checks=checks)
    return response


@pytest.mark.parametrize("path", STREAMS)
def test_every_event_of_a_stream_is_as_described(described, path):
    """Each chunk by its schema, until [DONE]."""
    options = {"stream_options": {"include_usage": True}} if path.startswith("/v1/") else {}
    body = {**STREAMS[path], "stream": True, **options}
    case = described.schema[path]["POST"].Case(body=body, media_type="application/json")
    assert tried(described, "POST", path, case).text.split()[-1] == "[DONE]"


def test_streamed_events_of_a_job_are_as_described(described):
    path = "/v1/fine_tuning/jobs/{job_id}/events"
    case = described.schema[path]["GET"].Case(path_parameters=names_in(described, path), query={"stream": "true"})
    response = tried(described, "GET", path, case)
    assert "successfully completed" in response.text
    assert response.text.split()[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("method", "path"), [one for one in OPERATIONS if "{" in one[1] and one[0] != "DELETE"], ids=str
)
def test_what_is_there_is_told_as_it_is_described(described, method, path):
    """Generated names name nothing: these do. What has ended cannot be paused, resumed or cancelled."""
    case = described.schema[path][method].Case(path_parameters=names_in(described, path))
    assert tried(described, method, path, case).status_code == (409 if method == "POST" else 200)


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=str)
def test_every_route_answers_as_it_is_described(described, method, path):
    """To requests that its description allows, and to others."""
    operation = described.schema[path][method]
    positive, negative = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    for mode in (positive, negative) if (method, path) in ASKING else (positive,):

        @hypothesis.seed(1)
        @hypothesis.settings(
            max_examples=FEWER.get((method, path), EXAMPLES),
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def answers(case):
            tried(described, method, path, case)

        answers()


def test_every_status_of_openais_routes_is_explained():
    """In the table of docs/openai.md: those that are described, and those that any route may have."""
    described = {
        int(status)
        for path, item in PATHS.items()
        if path.startswith("/v1/")
        for operation in item.values()
        for status in operation["responses"]
    }
    rows = re.findall(
        r"^\| ([\d, ]+) \|", (REPOSITORY / "docs" / "openai.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    explained = {int(status) for row in rows for status in row.split(",")}
    assert explained == {status for status in described if status >= 400} | {405, 500}
