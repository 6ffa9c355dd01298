"""OpenAI's client of a service in a test.

Its fixtures are imported by name: `from openai_client import started as started`, and `client`, which is its client.
"""

from types import SimpleNamespace

import httpx
import openai
import pytest
from running import FACTS, QUICK, http, running

CONTEXT = 400
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def sdk(client: httpx.Client, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", **{"api_key": "anything", "max_retries": 0, **options})


def ask(question, **options):
    return {"model": "stable", "messages": [{"role": "user", "content": question}], "temperature": 0, **options}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A service that has learnt one fact, and OpenAI's client of it."""
    home = tmp_path_factory.mktemp("openai")
    with running(home, {**QUICK, "serving.max_context": CONTEXT, "serving.fuse": "always"}) as service:
        checkpoint = service.learn(FACTS[0])
        with http(service.service, service._thread) as client:
            yield SimpleNamespace(service=service, http=client, client=sdk(client), checkpoint=checkpoint)


@pytest.fixture
def client(started):
    return started.client
