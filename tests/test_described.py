"""schemathesis over `/openapi.json`, on a running service: no 5xx, no answer outside its description."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from running import FACTS, QUICK, http, running
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
OPERATIONS = [
    (method.upper(), path) for path, item in document()["paths"].items() for method in item if path != "/openapi.json"
]
EXAMPLES = 8
#: statuses of 5xx that are described: nothing is at fault with the service
EXPECTED = {("POST", "/eval"): {503}}  # no anchors are configured, and no hub can be reached


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A service with a checkpoint and something of everything, as its description tells it."""
    settings = {**QUICK, "serving.max_context": 96, "server.max_body_mb": 0.2}
    with running(tmp_path_factory.mktemp("described"), settings) as service:
        service.learn(FACTS[0])
        with http(service.service, service._thread) as client:
            yield client, schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


HELLO = {"messages": [{"role": "user", "content": "Hello!"}]}
STREAMS = {
    "/search": {"prompt": "Hello!"},
    "/v1/chat/completions": {"model": "stable", **HELLO, "logprobs": True, "top_logprobs": 1, "n": 2},
    "/v1/completions": {"model": "stable", "prompt": "Hello!", "logprobs": 1},
}


@pytest.mark.parametrize("path", STREAMS)
def test_every_event_of_a_stream_is_as_described(described, path):
    """Each chunk by its schema, until [DONE]."""
    client, schema = described
    options = {"stream_options": {"include_usage": True}} if path.startswith("/v1/") else {}
    case = schema[path]["POST"].Case(body={**STREAMS[path], "stream": True, **options}, media_type="application/json")
    response = case.call(base_url=str(client.base_url))
    assert response.text.endswith("data: [DONE]\n\n") or response.text.endswith("data: [DONE]\r\n\r\n")
    case.validate_response(response, checks=CHECKS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda value: str(value))
def test_every_route_answers_as_it_is_described(described, method, path):
    """To requests that its description allows, and to others."""
    client, schema = described
    operation = schema[path][method]
    checks = [check for check in CHECKS if not (check is not_a_server_error and (method, path) in EXPECTED)]

    for mode in schemathesis.GenerationMode:

        @hypothesis.seed(1)
        @hypothesis.settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def tried(case):
            response = case.call(base_url=str(client.base_url), timeout=20)
            case.validate_response(response, checks=checks)

        try:
            tried()
        except hypothesis.errors.Unsatisfiable:  # nothing that the description forbids can be sent
            assert mode is schemathesis.GenerationMode.NEGATIVE
