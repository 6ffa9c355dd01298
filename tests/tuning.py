"""A service to fine-tune by OpenAI's API in a test: its client, its files, and its jobs.

Its fixtures are imported by name: `from tuning import started as started`, and `client`, which is that service's.
"""

import json
from types import SimpleNamespace

import openai
import pytest
from running import QUICK, http, running, until

#: updates wait for company; what has terms of its own does not
WAITING = {**QUICK, "update_mode": "batched", "batch.max_examples": 3, "batch.max_age_minutes": 1000}
ENDLESS = {"n_epochs": 1000}


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def jsonl(*facts):
    return "".join(json.dumps(chat(*fact), ensure_ascii=False) + "\n" for fact in facts).encode()


def sdk(client):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="anything", max_retries=0)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    home = tmp_path_factory.mktemp("tuning")
    with running(home, WAITING) as service, http(service.service, service._thread) as client:
        yield SimpleNamespace(service=service, http=client, client=sdk(client))


@pytest.fixture
def client(started):
    return started.client


def upload(client, *facts, name="facts.jsonl"):
    return client.files.create(file=(name, jsonl(*facts)), purpose="fine-tune")


def create(client, *facts, model="stable", **options):
    return client.fine_tuning.jobs.create(model=model, training_file=upload(client, *facts).id, **options)


def ended(client, job, status="succeeded"):
    def there():
        found = client.fine_tuning.jobs.retrieve(job.id)
        return found if found.status in ("succeeded", "failed", "cancelled") else None

    found = until(there, f"{job.id} {status}")
    assert found.status == status, found.error
    return found
