"""A service behind HTTP in a test, that was taught one fact, and short ways to ask it.

Its fixtures are imported by name: `from served import started as started`, and `client`, which is that service's.
"""

from types import SimpleNamespace

import pytest
from running import FACTS, QUICK, Running, http, until

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
