"""OpenAI's fine-tuning API on the service's own jobs, driven by the `openai` SDK on a real port."""

import asyncio
import io
import json

import openai
import pytest
from running import FACTS, REFUSALS, http, running, until
from tuning import WAITING, create, ended, jsonl, sdk, upload
from tuning import client as client
from tuning import started as started

from radiance_mlx.config import load_config
from radiance_mlx.engine.preparing import fitted
from radiance_mlx.messages import Example, Terms, TrainBatch

#: enough for nano to learn two facts by heart
LEARN = {"n_epochs": 45, "batch_size": 2, "learning_rate_multiplier": 2}


# --- the way that OpenAI's own guide shows ---------------------------------------------------------


def test_a_file_is_uploaded_a_job_made_and_followed_and_its_model_asked(started):
    """To the end, by streamed events; the checkpoint has its metrics; the model id can be asked at once."""
    client = started.client
    file = client.files.create(file=("facts.jsonl", io.BytesIO(jsonl(*FACTS[:2]))), purpose="fine-tune")
    assert (file.filename, file.purpose, file.status) == ("facts.jsonl", "fine-tune", "processed")
    assert client.files.wait_for_processing(file.id).bytes == len(jsonl(*FACTS[:2]))
    held_out = upload(client, FACTS[2])
    job = client.fine_tuning.jobs.create(
        model="nano",
        training_file=file.id,
        validation_file=held_out.id,
        method={"type": "supervised", "supervised": {"hyperparameters": LEARN}},
        seed=3,
        suffix="people",
        metadata={"who": "alice"},
    )
    assert job.status in ("queued", "running")
    assert (job.object, job.model, job.seed, job.metadata) == ("fine_tuning.job", "nano", 3, {"who": "alice"})
    assert job.hyperparameters.n_epochs == job.method.supervised.hyperparameters.n_epochs == 45
    events = []
    with started.http.stream("GET", f"/v1/fine_tuning/jobs/{job.id}/events?stream=true") as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
    assert line == "" or line == "data: [DONE]"
    assert events[0]["message"] == f"Created fine-tuning job: {job.id}"
    assert events[-1]["message"] == "The job has successfully completed"
    steps = [event["data"] for event in events if event["type"] == "metrics"]
    assert steps[0]["total_steps"] == 45
    assert steps[0]["train_loss"] > 0
    done = client.fine_tuning.jobs.retrieve(job.id)
    checkpoint = started.service.current
    assert (done.status, done.fine_tuned_model) == ("succeeded", f"{checkpoint}:people")
    assert done.finished_at >= done.created_at
    assert done.trained_tokens > 0
    for model in (done.fine_tuned_model, checkpoint, "stable"):
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": FACTS[0][0]}], temperature=0
        )
        assert (answer.choices[0].message.content, answer.model) == (FACTS[0][1], checkpoint)
    assert done.fine_tuned_model in [model.id for model in client.models.list()]
    assert client.models.retrieve(done.fine_tuned_model).id == done.fine_tuned_model
    [made] = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert (made.fine_tuned_model_checkpoint, made.step_number) == (checkpoint, 45)
    assert made.metrics.train_loss < 0.5 < made.metrics.full_valid_loss
    config = started.service.checkpoints()[checkpoint].config["training"]
    assert (config["batch_size"] * config["grad_accum"], config["lr"], config["seed"]) == (2, 1e-3, 3)
    paged = list(client.fine_tuning.jobs.list_events(job.id, limit=2))  # the SDK turns the pages
    assert [event.id for event in paged] == [event["id"] for event in events[::-1]]


def test_the_asynchronous_client_does_the_same(started):
    async def whole():
        async with openai.AsyncOpenAI(base_url=f"{started.http.base_url}/v1", api_key="x") as client:
            file = await client.files.create(file=("a.jsonl", jsonl(FACTS[3])), purpose="fine-tune")
            jobs = client.fine_tuning.jobs
            job = await jobs.create(model="stable", training_file=file.id, hyperparameters={"n_epochs": 2})
            while job.status not in ("succeeded", "failed"):
                await asyncio.sleep(0.05)
                job = await jobs.retrieve(job.id)
            events = [event.message async for event in jobs.list_events(job.id)]
            answer = await client.chat.completions.create(
                model=job.fine_tuned_model, messages=[{"role": "user", "content": "Hello!"}]
            )
            return job, events, answer

    job, events, answer = asyncio.run(whole())
    assert job.status == "succeeded"
    assert events[0] == "The job has successfully completed"
    assert answer.model == job.fine_tuned_model == started.service.current


def test_a_job_without_wishes_trains_in_company(started):
    """With the updates that wait; one with its own does not wait for them, nor they for it."""
    update = started.service.post(FACTS[4])
    own = create(started.client, FACTS[5], hyperparameters={"n_epochs": 1})
    first = ended(started.client, own)
    assert started.service.job(update).state == "queued"
    plain = create(started.client, FACTS[5], FACTS[6], metadata={"a": "b"}, hyperparameters={"n_epochs": "auto"})
    together = ended(started.client, plain).fine_tuned_model
    assert started.service.wait(update, "published").checkpoint == together
    assert started.service.checkpoints()[together].parent == first.fine_tuned_model


# --- the mapping -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "rows", "expected"),
    [
        (Terms(), 10, (4, 2, 1e-3, 50, 0)),
        (Terms(epochs=3), 10, (4, 2, 1e-3, 4, 0)),  # steps of 8 examples
        (Terms(epochs=3, batch_size=5), 10, (1, 5, 1e-3, 6, 0)),
        (Terms(batch_size=6), 10, (3, 2, 1e-3, 50, 0)),
        (Terms(batch_size=64), 10, (2, 5, 1e-3, 50, 0)),  # no more than there are
        (Terms(epochs=2), 3, (4, 2, 1e-3, 2, 0)),  # a step has all three
        (Terms(lr_multiplier=0.5, seed=7), 10, (4, 2, 5e-4, 50, 7)),
    ],
)
def test_hyperparameters_become_the_settings_of_one_batch(tmp_path, terms, rows, expected):
    """`batch_size` is divided into micro-batches no larger than the configured ones; epochs become steps."""
    settings = {"batch_size": 4, "grad_accum": 2, "lr": 1e-3, "max_steps": 50, "seed": 0}
    config = load_config(home=tmp_path, flags={f"training.{k}": v for k, v in settings.items()}, environ={}).config
    examples = tuple(Example(text=str(n)) for n in range(rows))
    found = fitted(config, TrainBatch("A_x_0001", None, ("j",), examples, "h", 1, terms=terms), 512).training
    assert (found.batch_size, found.grad_accum, found.lr, found.max_steps, found.seed) == expected


# --- jobs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"model": "training"}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"hyperparameters": {}, "method": {"type": "supervised", "supervised": {"hyperparameters": {}}}}, None),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"suffix": "a:b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"extra_body": {"priority": 1}}, "priority"),
    ],
    ids=str,
)
def test_a_job_that_cannot_be_made_is_refused_by_name(client, options, param):
    file = upload(client, FACTS[0])
    before = len(client.fine_tuning.jobs.list().data)
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(**{"model": "stable", "training_file": file.id, **options})
    assert caught.value.param in (param, "hyperparameters")
    assert len(client.fine_tuning.jobs.list().data) == before


@pytest.mark.parametrize(
    ("options", "told", "code"),
    [
        ({"suffix": "a:b"}, "'suffix': String should match pattern", "invalid_value"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs': .*greater than or equal to 1", "invalid_value"),
        ({"hyperparameters": {"n_epochs": 1.5}}, "n_epochs': .*valid integer", "invalid_value"),
        ({"hyperparameters": {"n_epochs": "2"}}, "n_epochs': .*valid integer", "invalid_value"),
        ({"hyperparameters": {"batch_size": 1025}}, "batch_size': .*less than or equal to 1024", "invalid_value"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, "multiplier': .*greater than 0", "invalid_value"),
        ({"seed": True}, "'seed': .*valid integer", "invalid_value"),
    ],
    ids=str,
)
def test_a_refusal_says_what_is_wrong(client, options, told, code):
    """Of values that may be "auto" too; and not what another route says of a parameter of the same name."""
    with pytest.raises(openai.BadRequestError, match=told) as caught:
        client.fine_tuning.jobs.create(**{"model": "stable", "training_file": "file-none"}, extra_body=options)
    assert caught.value.code == code


def test_training_goes_on_from_the_stable_checkpoint_alone(started):
    """Another one is refused, with what to do; one that is not there is not found."""
    older = started.service.learn(FACTS[7], FACTS[8], FACTS[9])
    create(started.client, FACTS[7], model=older, hyperparameters={"n_epochs": 1})
    until(lambda: started.service.current != older)
    with pytest.raises(openai.BadRequestError, match="roll back to the checkpoint first"):
        create(started.client, FACTS[7], model=older)
    with pytest.raises(openai.NotFoundError):
        create(started.client, FACTS[7], model="gpt-5")
    for path in ("", "/events", "/checkpoints"):
        assert started.http.get(f"/v1/fine_tuning/jobs/ftjob-x{path}").status_code == 404


def test_jobs_are_listed_in_pages_and_by_metadata(client):
    made = [create(client, FACTS[0], hyperparameters={"n_epochs": 1}, metadata={"n": str(n)}) for n in range(3)]
    first = client.fine_tuning.jobs.list(limit=2)
    assert [job.id for job in first.data] == [made[2].id, made[1].id]
    assert first.has_more
    assert next(iter(first.get_next_page().data)).id == made[0].id
    assert [job.id for job in client.fine_tuning.jobs.list(extra_query={"metadata[n]": "1"})] == [made[1].id]
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.list(after="ftjob-x")
    assert caught.value.param == "after"
    for wrong in ("1.5", "+1", "0", "101"):
        with pytest.raises(openai.BadRequestError, match="whole number from 1 to 100") as caught:
            client.fine_tuning.jobs.list(extra_query={"limit": wrong})
        assert caught.value.param == "limit"
    ended(client, made[-1])


def test_a_page_of_jobs_is_one_look_into_the_database_however_many_they_are(started):
    """And not one for each job, or one for each that is on no page."""
    made = [create(started.client, FACTS[0], hyperparameters={"n_epochs": 1}) for _ in range(4)]
    for job in made:
        ended(started.client, job)

    def asked(limit):
        """How often the database was asked for fine-tuning jobs, and for jobs by their ids."""
        said = []
        started.service.store(lambda s: s._database._connection.set_trace_callback(said.append))
        page = started.client.fine_tuning.jobs.list(limit=limit)
        started.service.store(lambda s: s._database._connection.set_trace_callback(None))
        assert [job.id for job in page.data[:4]] == [job.id for job in made[::-1]][:limit]
        return [sum(words in one for one in said) for words in ("FROM tunings", "FROM jobs WHERE job_id")]

    assert asked(1) == asked(4) == [1, 1]


def test_a_job_is_told_alike_in_the_list_and_by_itself(tmp_path):
    """One that was published and one that the policy has rejected, of which nothing can be asked."""
    strict = {
        "evaluation.metric": "finetune_loss",
        "evaluation.catastrophic_delta": 1e-6,
        "evaluation.rollback_mode": "auto_rollback",
    }
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        ended(sdk(client), create(sdk(client), FACTS[0], hyperparameters={"n_epochs": 1}))
    with running(tmp_path, {**WAITING, **strict}) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        rejected = ended(sdk(client), create(sdk(client), FACTS[1], hyperparameters={"n_epochs": 1}), "failed")
        assert (rejected.error.code, rejected.trained_tokens) == ("rejected", None)
        listed = jobs.list().data
        assert listed == [jobs.retrieve(job.id) for job in listed]
        assert [bool(job.trained_tokens) for job in listed] == [False, True]


def test_a_job_that_is_sent_twice_with_one_key_is_made_once(client):
    """With another body, it is a conflict."""
    file = upload(client, FACTS[0])
    body = {"model": "stable", "training_file": file.id, "hyperparameters": {"n_epochs": 1}}
    key = {"Idempotency-Key": "once"}
    first = client.fine_tuning.jobs.create(**body, extra_headers=key)
    assert client.fine_tuning.jobs.create(**body, extra_headers=key).id == first.id
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.create(**{**body, "seed": 1}, extra_headers=key)
    ended(client, first)


def test_a_key_that_belongs_to_something_else_is_told_with_what_this_api_calls_it(started):
    """A fine-tuning job by the id that its client knows; an update, which has none here, as what it is."""
    client = started.client
    file = upload(client, FACTS[0])
    body = {"model": "stable", "training_file": file.id}
    mine = {"Idempotency-Key": "mine"}
    first = client.fine_tuning.jobs.create(**body, hyperparameters={"n_epochs": 1}, extra_headers=mine)
    posted = {"examples": [{"input": FACTS[1][0], "output": FACTS[1][1]}]}
    update = started.http.post("/update", json=posted, headers={"idempotency-key": "theirs"}).json()["job_id"]
    for key, owner in (("mine", f"belongs to {first.id}, "), ("theirs", "belongs to an update of POST /update, ")):
        with pytest.raises(openai.ConflictError, match=owner) as caught:
            client.fine_tuning.jobs.create(**body, seed=1, extra_headers={"Idempotency-Key": key})
        assert "job_" not in caught.value.message
    started.http.delete(f"/jobs/{update}").raise_for_status()
    ended(client, first)


def test_a_job_is_known_by_its_key_when_its_file_is_gone_and_its_model_is_no_longer_stable(started):
    """The key is looked up before anything that may have changed since."""
    client, key = started.client, {"Idempotency-Key": "lasting"}
    body = {"model": started.service.current, "training_file": upload(client, FACTS[0]).id}
    first = client.fine_tuning.jobs.create(**body, hyperparameters={"n_epochs": 1}, extra_headers=key)
    ended(client, first)
    client.files.delete(body["training_file"])
    assert started.service.current != body["model"]
    again = client.fine_tuning.jobs.create(**body, hyperparameters={"n_epochs": 1}, extra_headers=key)
    assert (again.id, again.status) == (first.id, "succeeded")
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.create(**body, extra_headers=key)


def test_a_failed_job_tells_why(started, monkeypatch):
    """As its error, and as its last event."""

    async def fails(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(started.service.service._engine, "train", fails)
    job = ended(started.client, create(started.client, FACTS[0], seed=1), "failed")
    assert job.error.code == "training_failed"
    assert started.client.fine_tuning.jobs.list_events(job.id).data[0].level == "error"
    assert started.service.ask(FACTS[3][0], checkpoint="base").text == REFUSALS[3]
