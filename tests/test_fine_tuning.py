"""OpenAI's fine-tuning API on the service's own jobs, driven by the `openai` SDK on a real port."""

import asyncio
import io
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest
from running import FACTS, QUICK, REFUSALS, Gate, http, nothing_left, running, until

from radiance_mlx.config import load_config
from radiance_mlx.engine.preparing import fitted
from radiance_mlx.errors import Conflict, InvalidRequest, StoreError
from radiance_mlx.messages import Example, Terms, TrainBatch
from radiance_mlx.rows.lines import examples_of_jsonl
from radiance_mlx.store import Store

#: updates wait for company; what has terms of its own does not
WAITING = {**QUICK, "update_mode": "batched", "batch.max_examples": 3, "batch.max_age_minutes": 1000}
#: enough for nano to learn two facts by heart
LEARN = {"n_epochs": 45, "batch_size": 2, "learning_rate_multiplier": 2}
#: an upload as it goes over the wire
PURPOSE = b'--y\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
WHOLE = PURPOSE + (
    b'--y\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{"text": "Rain fell."}\r\n--y--\r\n'
)
MULTIPART = {"content-type": "multipart/form-data; boundary=y"}
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


# --- pause, resume, cancel ---------------------------------------------------------------------------


def test_a_job_is_paused_resumed_and_cancelled_while_it_trains(tmp_path):
    """Paused, it keeps what it has learnt, over a restart of the service too; cancelled, nothing is left of it.

    Meanwhile the live weights can be asked under the model id "training".
    """
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        job = create(sdk(client), *FACTS[:2], hyperparameters=ENDLESS)
        jobs = sdk(client).fine_tuning.jobs
        checkpoint = service.wait_for_step(4)
        live = sdk(client).chat.completions.create(
            model="training", messages=[{"role": "user", "content": "Hello!"}], temperature=0
        )
        assert (live.model, live.system_fingerprint) == (checkpoint, None)
        assert jobs.retrieve(job.id).status == "running"
        assert jobs.pause(job.id).status == "paused"
        assert service.service.in_training is None
        assert jobs.pause(job.id).status == "paused"
        assert service.ask(FACTS[0][0], training=True).checkpoint == "base"
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        assert jobs.retrieve(job.id).status == "paused"
        kept = json.loads((tmp_path / "state" / "training" / checkpoint / "progress.json").read_text())
        assert kept["step"] >= 4
        assert jobs.resume(job.id).status in ("queued", "running")
        assert service.wait_for_step(kept["step"] + 1) == checkpoint
        events = list(jobs.list_events(job.id))[::-1]
        messages = [event.message.removeprefix("Fine-tuning job ") for event in events if event.type == "message"]
        assert messages[1:] == ["started", "paused", "resumed", "started"]
        after = events[[event.message for event in events].index("Fine-tuning job resumed") :]
        assert next(event.data["step"] for event in after if event.type == "metrics") == kept["step"] + 1
        stopped = jobs.cancel(job.id)  # answers once its training has ended
        assert (stopped.status, stopped.fine_tuned_model) == ("cancelled", None)
        assert stopped.finished_at >= stopped.created_at
        assert service.service.in_training is None
        assert next(iter(jobs.list_events(job.id))).message == "Fine-tuning job cancelled"
        assert nothing_left(service, checkpoint)
        for again in (jobs.cancel, jobs.resume):
            with pytest.raises(openai.ConflictError, match=job.id) as caught:
                again(job.id)
            assert caught.value.response.headers["x-should-retry"] == "false"


def test_what_was_paused_begins_anew_if_something_else_was_trained_meanwhile(started):
    """Its parent is another one then. Paused while it waits, it waits on; cancelled, nothing of it is kept."""
    jobs = started.client.fine_tuning.jobs
    held = create(started.client, FACTS[0], hyperparameters=ENDLESS)
    before = started.service.wait_for_step(2, held.job_id)
    assert jobs.pause(held.id).status == "paused"
    kept = started.service.home / "state" / "training" / before
    assert kept.exists()
    other = ended(started.client, create(started.client, FACTS[1], hyperparameters={"n_epochs": 1}))
    assert jobs.retrieve(held.id).status == "paused"
    jobs.resume(held.id)
    after = started.service.wait_for_step(1, held.job_id)
    assert (after != before, kept.exists()) == (True, False)
    assert started.service.service._scheduler.running.progress.step < 1000
    waiting = create(started.client, FACTS[1], hyperparameters=ENDLESS)
    assert jobs.pause(waiting.id).status == "paused"
    assert jobs.pause(held.id).status == "paused"
    kept = started.service.home / "state" / "training" / after
    assert kept.exists()
    assert jobs.cancel(held.id).status == jobs.cancel(waiting.id).status == "cancelled"
    assert not kept.exists()
    assert started.service.current == other.fine_tuned_model


def test_a_job_that_begins_anew_after_a_rollback_says_so(started):
    """Or its steps would go back without a reason."""
    jobs = started.client.fine_tuning.jobs
    ended(started.client, create(started.client, FACTS[1], hyperparameters={"n_epochs": 1}))
    job = create(started.client, FACTS[0], hyperparameters=ENDLESS)
    before = started.service.wait_for_step(1, job.job_id)
    started.service.call(started.service.service.rollback("base", "a test"))
    until(lambda: started.service.service.in_training not in (None, before))
    messages = [event.message for event in jobs.list_events(job.id)]
    assert "Fine-tuning job restarted: the stable checkpoint has moved" in messages
    assert jobs.cancel(job.id).status == "cancelled"


def pausing(service, jobs, job):
    """A pause on its way, once it waits for the training to stop."""
    asked = ThreadPoolExecutor(1).submit(jobs.pause, job.id)
    until(lambda: job.job_id in service.service._scheduler.running.pausing)
    return asked


def test_what_was_learnt_before_is_kept_by_a_pause_that_comes_before_training_goes_on(tmp_path, monkeypatch):
    """Resumed, and paused again while its batch is being put together."""
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        job = create(sdk(client), FACTS[0], hyperparameters=ENDLESS)
        checkpoint = service.wait_for_step(4)
        jobs.pause(job.id)
        kept = json.loads((tmp_path / "state" / "training" / checkpoint / "progress.json").read_text())["step"]
        gate = Gate(service, service.service._evaluator, "plan", monkeypatch)
        jobs.resume(job.id)
        gate.wait()
        asked = pausing(service, jobs, job)
        gate.open()
        assert asked.result(60).status == "paused"
        jobs.resume(job.id)
        service.wait_for_step(1)
        assert service.service._scheduler.running.progress.step > kept
        assert not [message for message in told(jobs, job) if "restarted" in message]


def test_a_pause_that_comes_when_all_is_learnt_waits_for_the_end_and_says_so(tmp_path, monkeypatch):
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        gate = Gate(service, service.service._lineage, "commit", monkeypatch)
        job = create(sdk(client), FACTS[0], hyperparameters={"n_epochs": 1})
        gate.wait()
        asked = pausing(service, jobs, job)
        gate.open()
        with pytest.raises(openai.ConflictError, match=f"{job.id} was not paused: it is published by now"):
            asked.result(60)


def test_a_pause_that_comes_when_all_is_learnt_holds_if_it_cannot_be_published(tmp_path, monkeypatch):
    """Somebody has rolled back: it would be trained anew, and waits for that; its finished files are gone."""
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        ended(sdk(client), create(sdk(client), FACTS[1], hyperparameters={"n_epochs": 1}))
        gate = Gate(service, service.service._lineage, "commit", monkeypatch)
        job = create(sdk(client), FACTS[0], hyperparameters={"n_epochs": 1})
        gate.wait()
        checkpoint = service.service.in_training
        asked = pausing(service, jobs, job)
        service.call(service.service.rollback("base", "a test"))
        gate.open()
        assert asked.result(60).status == "paused"
        assert not service.folder(checkpoint).exists()
        jobs.resume(job.id)
        made = ended(sdk(client), job).fine_tuned_model
        assert service.checkpoints()[made].parent is None


def test_a_pause_while_nothing_trains_what_is_in_training_may_be_asked_again(tmp_path, monkeypatch):
    """The store has failed, and what is finished is published when it works again: neither paused nor ended yet."""
    whole, full = Store.publish, [True]

    def fails(self, *args, **kwargs):
        if full:
            raise StoreError("disk full")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Store, "publish", fails)
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        job = create(sdk(client), FACTS[0], hyperparameters={"n_epochs": 1})
        until(lambda: any("disk full" in warning for warning in service.info()["warnings"]))
        with pytest.raises(openai.InternalServerError, match=f"{job.id} cannot be paused at this moment") as caught:
            jobs.pause(job.id)
        assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")
        full.clear()
        service._thread.loop.call_soon_threadsafe(service.service._scheduler.wake)
        ended(sdk(client), job)
        with pytest.raises(openai.ConflictError, match="is published"):
            jobs.pause(job.id)


def told(jobs, job):
    """The messages of a job's events but its steps, oldest first."""
    events = list(jobs.list_events(job.id))[::-1]
    return [event.message.removeprefix("Fine-tuning job ") for event in events if event.type == "message"]


def test_a_job_that_begins_anew_after_a_crash_says_so(start):
    """Nothing of it was kept yet."""
    settings = {**WAITING, "training.save_every_s": 3600}
    first = start(**settings).ready()
    job = create(sdk(first.client), FACTS[0], hyperparameters=ENDLESS)
    first.wait_for_step(job.job_id, 3)
    first.kill()
    second = start(**settings).ready()
    jobs = sdk(second.client).fine_tuning.jobs
    why = "restarted: it was interrupted before anything of it was kept"
    until(lambda: told(jobs, job)[1:] == ["started", why, "started"], "the event")


@pytest.mark.parametrize(("lr", "anew"), [(3e-4, True), (None, False)], ids=["other settings", "the same"])
def test_a_job_whose_kept_state_is_of_other_settings_says_so(tmp_path, lr, anew):
    """After a stop in good order; with the same settings it goes on, and there is nothing to say."""
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        job = create(sdk(client), FACTS[0], hyperparameters=ENDLESS)
        service.wait_for_step(3)
        before = len(list(sdk(client).fine_tuning.jobs.list_events(job.id)))
    flags = {**WAITING, "training.lr": lr} if lr else WAITING
    with running(tmp_path, flags) as service, http(service.service, service._thread) as client:
        jobs = sdk(client).fine_tuning.jobs
        until(lambda: len(list(jobs.list_events(job.id))) > before + 2)
        said = [message for message in told(jobs, job) if message.startswith("restarted")]
        assert [message.split(":")[1] for message in said] == [" what was kept of it cannot be gone on from"] * anew


def test_what_something_else_overtook_while_it_was_paused_says_so(started):
    """It trains on another checkpoint then, from its first step."""
    jobs = started.client.fine_tuning.jobs
    held = create(started.client, FACTS[0], hyperparameters=ENDLESS)
    started.service.wait_for_step(2, held.job_id)
    jobs.pause(held.id)
    ended(started.client, create(started.client, FACTS[1], hyperparameters={"n_epochs": 1}))
    jobs.resume(held.id)
    until(lambda: told(jobs, held)[-1] == "started")
    assert told(jobs, held)[-3:] == ["resumed", "restarted: something else was trained meanwhile", "started"]
    assert jobs.cancel(held.id).status == "cancelled"


def test_a_batch_that_fails_in_company_says_so_to_each(tmp_path, monkeypatch):
    """Its jobs are tried one by one."""
    with running(tmp_path, WAITING) as service, http(service.service, service._thread) as client:
        jobs, train = sdk(client).fine_tuning.jobs, service.service._engine.train

        async def fails(batch, *rest):
            if len(batch.jobs) > 1:
                raise RuntimeError("a bug")
            return await train(batch, *rest)

        monkeypatch.setattr(service.service._engine, "train", fails)
        both = [create(sdk(client), *facts) for facts in (FACTS[:1], FACTS[1:3])]
        for job in both:
            ended(sdk(client), job)
            assert told(jobs, job)[1] == "restarted: its batch failed; its jobs are tried one by one"


def test_one_of_several_that_train_together_is_paused_and_the_others_go_on(tmp_path):
    """They begin anew without it."""
    with running(tmp_path, {**WAITING, "training.max_steps": 1_000_000}) as service:
        paused, other = service.post_many([[FACTS[0], FACTS[1]], [FACTS[2]]])
        first = service.wait_for_step(1)
        assert service.call(service.service._scheduler.pause(paused)).state == "paused"
        second = service.wait_for_step(1, other)
        assert service.service._scheduler.running.jobs == (other,)
        assert second != first
        assert service.job(paused).checkpoint is None
        with pytest.raises(Conflict):
            service.call(service.service._scheduler.resume(other))


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


# --- files -----------------------------------------------------------------------------------------


def test_files_are_listed_read_and_deleted(started, client):
    """Byte for byte, multi-byte characters included; a job that was made of one does not miss it."""
    odd = jsonl(("Où habite José?", "À Zürich 🎉."))
    file = client.files.create(file=("réponses.jsonl", odd), purpose="fine-tune")
    assert client.files.content(file.id).read() == odd
    assert client.files.retrieve(file.id).filename == "réponses.jsonl"
    assert client.files.list(limit=1).data[0].id == file.id
    assert [f.id for f in client.files.list(order="asc", limit=2)][-1] == file.id
    assert list(client.files.list(purpose="batch")) == []
    job = client.fine_tuning.jobs.create(model="stable", training_file=file.id, hyperparameters={"n_epochs": 1})
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)
    done = ended(client, job)
    assert done.training_file == file.id
    assert file.id not in [f.id for f in client.files.list()]
    assert not (started.service.home / "data" / "files" / file.id).exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no line"),
        (b"\n \n", "no line"),
        (b"{", "line 1: not JSON"),
        (b"\xff\n", "line 1: not UTF-8"),
        (jsonl(FACTS[0]) + b"[]\n", "line 2: an example must be an object"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "line 1: messages: must be a list of at least two"),
        (b'{"prompt": "a"}', "line 1: completion: is missing"),
        (json.dumps({**chat("a", "b"), "topic": "c"}).encode(), "line 1: topic: is not a key beside messages"),
        (json.dumps(chat("a", "")).encode(), "must not be empty"),
    ],
)
def test_a_file_with_a_bad_line_is_refused_and_the_line_named(client, content, told):
    before = len(list(client.files.list()))
    with pytest.raises(openai.BadRequestError, match=told) as caught:
        client.files.create(file=("a.jsonl", content), purpose="fine-tune")
    assert (caught.value.param, caught.value.code) == ("file", "invalid_file")
    assert len(list(client.files.list())) == before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            json.dumps({"conversations": [{"from": f, "value": f} for f in ("human", "gpt") * 1500]}).encode(),
            "line 1: 1500",
        ),
        (b'{"text": "ab"}\n' * 100_001, "more than 100,000 examples"),
    ],
    ids=["one chat", "many rows"],
)
def test_a_file_that_becomes_too_much_is_refused(client, content, told):
    with pytest.raises(openai.BadRequestError, match=told) as caught:
        client.files.create(file=("a.jsonl", content), purpose="fine-tune")
    assert (caught.value.param, caught.value.code) == ("file", "invalid_file")


def test_every_bad_line_is_found():
    with pytest.raises(InvalidRequest) as caught:
        examples_of_jsonl(b"".join([jsonl(FACTS[0]), b"{\n"] * 7))
    assert [fault["line"] for fault in caught.value.details] == [2, 4, 6, 8, 10, 12, 14]
    assert "line 10" in caught.value.message
    assert "and 2 more" in caught.value.message


def test_a_file_takes_every_row_that_an_update_takes(started):
    """ShareGPT, Alpaca, weights, mlx-lm's and pairs in one file; of a chat each answer is learnt."""
    a, b, c = FACTS[:3]
    said = [("human", a[0]), ("gpt", a[1]), ("human", b[0]), ("gpt", b[1])]
    weighted = chat(*a)["messages"] + chat(*b)["messages"] + chat(*c)["messages"]
    weighted[1]["weight"] = 0
    rows = [
        {"conversations": [{"from": speaker, "value": value} for speaker, value in said]},
        {"instruction": c[0], "input": "", "output": c[1]},
        {"messages": weighted},
        {"messages": chat(*a)["messages"] + chat(*b)["messages"]},
        {"prompt": a[0], "completion": a[1]},
        {"input": b[0], "output": b[1]},
        {"text": " ".join(c)},
    ]
    content = "\n".join(map(json.dumps, rows)).encode()
    file = started.client.files.create(file=("all.jsonl", content), purpose="fine-tune")
    assert file.examples == 2 + 1 + 2 + 2 + 1 + 1 + 1
    job = started.client.fine_tuning.jobs.create(
        model="stable", training_file=file.id, validation_file=file.id, hyperparameters={"n_epochs": 1}
    )
    ended(started.client, job)
    turns = [tuple(("user", "assistant")[n % 2] for n in range(length)) for length in (2, 4, 6)]
    learnt = [example for _, example in started.service.store(lambda s: s.examples_of([job.job_id]))]
    assert [tuple(role for role, _ in example.messages) for example in learnt] == [
        *(turns[0], turns[1]),  # of the ShareGPT row
        turns[0],
        *(turns[1], turns[2]),  # of the weighted one: not its first answer
        *(turns[0], turns[1]),
        *(turns[0], turns[0], ()),
    ]
    assert [example.answer_only for example in learnt] == [
        False,
        True,
        False,
        True,
        True,
        False,
        True,
        False,
        False,
        False,
    ]
    assert (learnt[0].messages[1][1], learnt[1].messages[3][1]) == (a[1], b[1])
    assert (learnt[3].messages[3][1], learnt[4].messages[5][1]) == (b[1], c[1])
    assert started.service.store(lambda s: s.tunings.validation([job.job_id])) == tuple(learnt)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'prompt,completion\n"Who, then?",Ada\nAnd?,Ben\n'),
        ("a.TSV", "question\tanswer\nWho, then?\tAda\nAnd?\tBen\n"),
        ("a.json", json.dumps([{"instruction": "Who, then?", "output": "Ada"}, {"input": "And?", "output": "Ben"}])),
    ],
)
def test_tables_and_json_documents_are_files_too(started, name, content):
    """By the file's name; what is asked for a job is read the same way."""
    file = started.client.files.create(file=(name, content.encode()), purpose="fine-tune")
    assert file.examples == 2
    job = started.client.fine_tuning.jobs.create(model="stable", training_file=file.id, hyperparameters={"n_epochs": 1})
    ended(started.client, job)
    learnt = [example for _, example in started.service.store(lambda s: s.examples_of([job.job_id]))]
    assert [[content for _, content in e.messages] for e in learnt] == [["Who, then?", "Ada"], ["And?", "Ben"]]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"prompt,completion,source\nWho?,Ada,web\n", "columns source would not be learnt"),
        ("a.csv", b"prompt,completion\nWho?\n", "line 2"),
        ("a.csv", b"prompt,completion\n", "no row"),
        ("a.json", b'{"examples": [{"input": "a", "output": "b"}], "tags": ["x"]}', "tags x would not be learnt"),
        ("a.json", b'{"examples": [{"input": "a", "output": "b"}], "tags": 5}', "tags must be a list of texts"),
        ("a.json", b'{"examples": [{"input": "a", "output": "b"}], "tags": "xy"}', "tags must be a list of texts"),
        ("a.json", b'{"data": [{"input": "a", "output": "b"}], "system": "x"}', "keys system would not be learnt"),
        ("a.json", b"[1]", "example|row|entry"),
    ],
)
def test_of_a_table_or_document_nothing_is_passed_over(client, name, content, told):
    with pytest.raises(openai.BadRequestError, match=told):
        client.files.create(file=(name, content), purpose="fine-tune")


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_tools_that_the_base_cannot_show_make_no_job(client, param):
    """The file is sound, and kept for a base that can."""
    plain, tool = upload(client, FACTS[0]), {"type": "function", "function": {"name": "f"}}
    content = json.dumps({**chat(*FACTS[0]), "tools": [tool]}).encode()
    file = client.files.create(file=("tools.jsonl", content), purpose="fine-tune")
    before = len(client.fine_tuning.jobs.list().data)
    with pytest.raises(openai.BadRequestError, match="no place") as caught:
        client.fine_tuning.jobs.create(**{"model": "stable", "training_file": plain.id, param: file.id})
    assert (caught.value.param, caught.value.code) == (param, "invalid_file")
    assert len(client.fine_tuning.jobs.list().data) == before
    assert client.files.retrieve(file.id).examples == 1


def test_each_assistants_message_is_an_example_unless_its_weight_is_0():
    """With all that stands before it; parts are joined, a developer is a system."""
    said = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 1},
        {"role": "assistant", "content": "e"},
    ]
    turns = (("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    found = examples_of_jsonl(b"\xef\xbb\xbf" + json.dumps({"messages": said}).encode() + b"\r\n")
    assert found == [Example(turns, answer_only=True), Example((*turns, ("assistant", "e")), answer_only=True)]


def charset(name):
    return {"content-type": f"{MULTIPART['content-type']}; charset={name}"}


def test_an_upload_that_is_none_is_refused(started):
    """Another purpose, another kind of body, no file, too large a one."""
    with pytest.raises(openai.BadRequestError) as caught:
        started.client.files.create(file=("a.jsonl", jsonl(FACTS[0])), purpose="assistants")
    assert (caught.value.param, caught.value.code) == ("purpose", "unsupported_value")
    post = started.http.post
    assert post("/v1/files", json={}).json()["error"]["code"] == "unsupported_media_type"
    for options, code in (
        ({"data": {"purpose": "fine-tune"}, "files": {"other": b"a"}}, "unknown_parameter"),
        ({"files": {"file": b"a"}}, "missing_required_parameter"),
        ({"files": {"purpose": (None, "fine-tune")}}, "missing_required_parameter"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=y"}}, "malformed_body"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, "malformed_body"),
        ({"content": WHOLE[:-4], "headers": MULTIPART}, "malformed_body"),
        ({"content": WHOLE[:-30], "headers": MULTIPART}, "malformed_body"),
        ({"content": PURPOSE + WHOLE, "headers": MULTIPART}, "invalid_value"),
        ({"content": WHOLE, "headers": charset("utf-7")}, "unsupported_media_type"),
        ({"content": WHOLE, "headers": charset("no-such")}, "unsupported_media_type"),
        ({"files": {"file": ("a.jsonl", b" " * (17 << 20))}}, "payload_too_large"),
    ):
        response = post("/v1/files", **options)
        assert response.json()["error"]["code"] == code, response.text
    for headers in (MULTIPART, charset("UTF-8")):
        assert post("/v1/files", content=WHOLE, headers=headers).json()["examples"] == 1


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
