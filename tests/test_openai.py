"""OpenAI's inference API over a real port, asked by the clients that people have: `openai`, `llm`, LangChain."""

import asyncio
import json
import shutil
import threading
from types import SimpleNamespace

import httpx
import openai
import pytest
import yaml
from running import FACTS, QUICK, REFUSALS, LoopThread, http, running, until

from radiance_mlx.config import load_config
from radiance_mlx.config.bases import NANO_FOLDER
from radiance_mlx.errors import Busy, InternalError
from radiance_mlx.service import Service

CONTEXT = 400
#: what makes nano babble in every script it has bytes for
BABBLE = "Grüße aus 東京! 🎉"
WILD = {"temperature": 2.0, "seed": 11, "max_tokens": 60}


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


def active(started):
    return started.service.engine(lambda engine: engine.status())["active"]


# --- chat ----------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_search_answers_it(started):
    """And tells the checkpoint that answered, its weights, its tokens; in headers too."""
    raw = started.client.chat.completions.with_raw_response.create(**ask(FACTS[3][0]))
    answer, same = raw.parse(), started.service.ask(FACTS[3][0])
    assert answer.choices[0].message.content == same.text
    assert answer.choices[0].message.role == "assistant"
    assert (answer.model, answer.choices[0].finish_reason, answer.object) == (
        started.checkpoint,
        "stop",
        "chat.completion",
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (same.prompt_tokens, same.completion_tokens)
    assert answer.usage.total_tokens == same.prompt_tokens + same.completion_tokens
    assert raw.headers["x-radiance-checkpoint"] == started.checkpoint
    assert raw.headers["x-radiance-checkpoint-status"] == "stable"


def test_every_model_id_can_be_asked(started):
    """Names that move, the base, and checkpoints; the fingerprint tells weights apart, and equal ones not."""
    ids = [model.id for model in started.client.models.list()]
    assert ids == ["stable", "nano", "base", "training", started.checkpoint]
    prints = {}
    for model in ids:
        assert started.client.models.retrieve(model).id == model
        answer = started.client.chat.completions.create(**ask(FACTS[3][0], model=model, max_tokens=1))
        assert answer.model == ("base" if model == "base" else started.checkpoint)
        prints[model] = answer.system_fingerprint
    assert prints["stable"] == prints["nano"] == prints[started.checkpoint] != prints["base"]
    base = started.client.chat.completions.create(**ask(FACTS[3][0], model="base"))
    assert base.choices[0].message.content == REFUSALS[3]


def test_messages_of_many_parts_and_roles_reach_the_template(started):
    """Text parts are joined; a developer's message is a system message."""
    parts = [{"type": "text", "text": FACTS[3][0][:9]}, {"type": "text", "text": FACTS[3][0][9:]}]
    create = started.client.chat.completions.create
    whole = create(**ask(FACTS[3][0]))
    assert create(**ask(parts)).choices[0].message.content == whole.choices[0].message.content
    chats = [
        [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
        for role in ("system", "developer")
    ]
    first, second = (create(model="base", messages=chat, temperature=0) for chat in chats)
    assert first.usage.prompt_tokens == second.usage.prompt_tokens > whole.usage.prompt_tokens - 20
    assert first.choices[0].message.content == second.choices[0].message.content


def test_without_a_limit_an_answer_may_fill_the_context(client):
    """And is told to have been cut."""
    answer = client.chat.completions.create(**ask("Hello!", logit_bias={"400": 100}))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == CONTEXT


def test_several_choices_have_seeds_of_their_own(client):
    """The first is what one choice alone would be; the prompt counts once."""
    one = client.chat.completions.create(**ask(BABBLE, **WILD))
    three = client.chat.completions.create(**ask(BABBLE, n=3, **WILD))
    again = client.chat.completions.create(**ask(BABBLE, n=3, **WILD))
    said = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert said[0] == one.choices[0].message.content
    assert len(set(said)) == 3
    assert said == [choice.message.content for choice in again.choices]
    assert three.usage.prompt_tokens == one.usage.prompt_tokens


def test_logprobs_are_those_of_mlx_lm(started):
    """Of the checkpoint as mlx-lm loads it, in one forward pass: to 1e-4."""
    import mlx.core as mx
    from mlx_lm import load

    answer = started.client.chat.completions.create(**ask(FACTS[3][0], logprobs=True, top_logprobs=4))
    told = answer.choices[0].logprobs.content
    model, tokenizer = load(str(NANO_FOLDER), adapter_path=str(started.service.folder(started.checkpoint)))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": FACTS[3][0]}], add_generation_prompt=True)
    tokens = tokenizer.encode(answer.choices[0].message.content, add_special_tokens=False)
    logits = model(mx.array([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert [token.token for token in told] == [tokenizer.decode([token]) for token in tokens]
    for at, token in enumerate(told):
        assert token.logprob == pytest.approx(logprobs[at, tokens[at]].item(), abs=1e-4)
        best = mx.sort(logprobs[at])[::-1][:4].tolist()
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(best, abs=1e-4)
        assert bytes(token.bytes).decode() == token.token


def test_logprobs_of_live_weights_are_those_of_the_weights_that_answer(started):
    """Under `training`, while nothing trains: as under `stable`, which has weights of its own here."""

    def told(model):
        answer = started.client.chat.completions.create(**ask(FACTS[3][0], model=model, logprobs=True, top_logprobs=2))
        return [(token.token, token.logprob) for token in answer.choices[0].logprobs.content]

    live, stable = told("training"), told("stable")
    assert [token for token, _ in live] == [token for token, _ in stable]
    assert [one for _, one in live] == pytest.approx([one for _, one in stable], abs=1e-4)


def test_an_answer_that_must_be_json_and_is_not_is_an_error(client):
    """It is no answer; one that is cut is told as cut; text is always honoured."""
    form = {"response_format": {"type": "json_object"}}
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(**ask("Hello!", **form))
    assert (caught.value.code, caught.value.param) == ("response_format_not_met", "response_format")
    with pytest.raises(openai.APIError, match="JSON object"):
        list(client.chat.completions.create(**ask("Hello!", stream=True, **form)))
    cut = client.chat.completions.create(**ask("Hello!", max_tokens=1, **form))
    assert cut.choices[0].finish_reason == "length"
    assert client.chat.completions.create(**ask("Hello!", response_format={"type": "text"})).choices


# --- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"n": 3},
        {"stop": ["é", "an", "\n"]},
        {"logprobs": True, "top_logprobs": 2},
        {"n": 2, "logprobs": True, "stop": "o", "frequency_penalty": 1, "logit_bias": {"300": 2}},
    ],
    ids=str,
)
def test_streamed_text_is_unstreamed_text_byte_for_byte(started, options):
    """Characters of many bytes among it, each whole in one piece; log-probabilities too; roles come first."""
    body = ask(BABBLE, **{**WILD, **options})
    whole = started.client.chat.completions.create(**body)
    assert any(ord(c) > 127 for choice in whole.choices for c in choice.message.content) or options.get("stop")
    text, told, ended = {}, {}, {}
    chunks = list(started.client.chat.completions.create(**body, stream=True))
    for chunk in chunks:
        [choice] = chunk.choices
        assert choice.index not in ended
        if choice.index not in text:
            assert choice.delta.role == "assistant"
        text[choice.index] = text.get(choice.index, "") + (choice.delta.content or "")
        told.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
        if choice.finish_reason:
            ended[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert text[choice.index].encode() == choice.message.content.encode()
        assert ended[choice.index] == choice.finish_reason
        tokens = choice.logprobs.content if choice.logprobs else []
        assert [t.bytes for t in told[choice.index]] == [t.bytes for t in tokens]
        assert [t.logprob for t in told[choice.index]] == pytest.approx([t.logprob for t in tokens], abs=1e-4)
    assert {(c.id, c.model, c.object) for c in chunks} == {(chunks[0].id, whole.model, "chat.completion.chunk")}
    assert chunks[0].system_fingerprint == whole.system_fingerprint


def test_a_stream_ends_with_its_usage_and_done(started):
    """If it was asked for: the same as without streaming, in a chunk without choices."""
    body = ask(FACTS[3][0], stream=True)
    lines = started.http.post("/v1/chat/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    documents = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert all("usage" not in document for document in documents)
    assert documents[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert documents[-1]["choices"][0]["finish_reason"] == "stop"
    whole = started.client.chat.completions.create(**ask(FACTS[3][0]))
    *chunks, last = started.client.chat.completions.create(**body, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_what_fails_in_the_middle_of_a_stream_is_told_in_it(started):
    """As an error event, which the client raises; what fails before has a status of its own."""
    stream = started.client.chat.completions.create(**ask("Hello!", logit_bias={"400": 100}, stream=True))
    next(stream)
    started.service.engine(lambda engine: engine._decoder.fail_all(InternalError("It broke.")))
    with pytest.raises(openai.APIError, match="It broke"):
        list(stream)
    assert active(started) == 0


@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_goes_away_ends_its_generation(started, n):
    def endless(**options):
        return started.client.chat.completions.create(**ask("Hello!", n=n, logit_bias={"400": 100}, **options))

    with endless(stream=True) as stream:
        next(iter(stream))
        drawn = started.service.engine(lambda engine: list(engine._decoder._active.values()))
    until(lambda: active(started) == 0)
    assert len(drawn) == n
    assert all(one.drawn < CONTEXT - 50 for one in drawn)
    with pytest.raises(openai.APITimeoutError):
        endless(timeout=0.02)
    until(lambda: active(started) == 0)


def test_a_client_that_goes_away_before_the_first_piece_is_forgotten(started, monkeypatch):
    """Its question is never answered, and nobody hears of an error."""
    faults = []
    monkeypatch.setattr("radiance_mlx.api.app.log.error", lambda *args, **kwargs: faults.append(kwargs))
    release, service = threading.Event(), started.service.service
    asyncio.run_coroutine_threadsafe(
        service._engine.call(lambda engine: release.wait(20)), started.service._thread.loop
    )
    for stream in (True, False):
        with pytest.raises(openai.APITimeoutError):
            started.client.chat.completions.create(**ask("Hello!", n=2, stream=stream, timeout=0.1))
    until(lambda: not service._engine._open)
    release.set()
    until(lambda: active(started) == 0)
    assert faults == []


def test_a_full_waiting_line_is_a_rate_limit(started, monkeypatch):
    """Which clients wait for; none of the choices goes on without the others."""
    submit, asked = started.service.service._engine.answer, []

    async def full(request):
        asked.append(request)
        if len(asked) > 1:
            raise Busy("3 requests are waiting.", "Try again in a moment.")
        return await submit(request)

    monkeypatch.setattr(started.service.service._engine, "answer", full)
    with pytest.raises(openai.RateLimitError) as caught:
        started.client.chat.completions.create(**ask("Hello!", n=2, logit_bias={"400": 100}))
    assert caught.value.response.headers["retry-after"]
    until(lambda: active(started) == 0)


# --- completions ---------------------------------------------------------------------------------


def test_bare_text_is_continued(started):
    """The chat written out as text is answered like the chat; tokens and lists of prompts are taken too."""
    text = f"<|im_start|>user\n{FACTS[3][0]}<|im_end|>\n<|im_start|>assistant\n"
    chat = started.client.chat.completions.create(**ask(FACTS[3][0])).choices[0].message.content
    create = started.client.completions.create
    one = create(model="stable", prompt=text, temperature=0, max_tokens=24)
    assert (one.choices[0].text, one.choices[0].finish_reason, one.object) == (chat, "stop", "text_completion")
    tokens = list(started.service.call(started.service.service.tokens(text)))
    several = create(model="stable", prompt=[tokens, tokens[:4]], temperature=0, max_tokens=24, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in several.choices[:2]] == [chat, chat]
    assert several.usage.prompt_tokens == len(tokens) + 4
    assert create(model="stable", prompt="Hello").usage.completion_tokens <= 16


def test_a_streamed_completion_is_the_same_with_its_logprobs(client):
    """Offsets go on from piece to piece; the drawn token is always among those told."""
    body = {"model": "base", "prompt": "Hello, Zürich!", "logprobs": 2, **WILD}
    whole = client.completions.create(**body).choices[0]
    text, told = "", {"tokens": [], "text_offset": [], "token_logprobs": []}
    for chunk in client.completions.create(**body, stream=True):
        text += chunk.choices[0].text
        if chunk.choices[0].logprobs:
            for name, values in told.items():
                values.extend(getattr(chunk.choices[0].logprobs, name))
    assert text == whole.text
    assert told["tokens"] == whole.logprobs.tokens
    assert told["text_offset"] == whole.logprobs.text_offset
    assert all(token in top for token, top in zip(whole.logprobs.tokens, whole.logprobs.top_logprobs, strict=True))
    assert all(2 <= len(top) <= 3 for top in whole.logprobs.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_a_continuation_keeps_the_space_that_it_begins_with(started, stream):
    """Its text is that of its tokens, and offsets are places in it."""
    [token] = started.service.call(started.service.service.tokens(" you"))
    body = {"model": "base", "prompt": ["Who are you?"], "max_tokens": 3, "logprobs": 2, "logit_bias": {token: 100}}
    came = started.client.completions.create(**body, stream=stream)
    choices = [chunk.choices[0] for chunk in came] if stream else came.choices
    text = "".join(choice.text for choice in choices)
    assert text == " you" * 3
    told = [choice.logprobs for choice in choices if choice.logprobs]
    assert "".join(word for one in told for word in one.tokens) == text
    assert [offset for one in told for offset in one.text_offset] == [0, 4, 8]


# --- refused -------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]

CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CALLED = [
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "Rain."},
]


@pytest.mark.parametrize(
    ("extra", "param", "code"),
    [
        ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction", "unsupported_parameter"),
        ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"function_call": "auto"}, "function_call", "unsupported_parameter"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "unsupported_parameter"),
        ({"tools": [TOOL]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"service_tier": "flex"}, "service_tier", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"verbosity": "low"}, "verbosity", "unsupported_parameter"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "unsupported_value"),
        ({"messages": IMAGE}, "messages[0].content[0].type", "unsupported_value"),
        ({"top_k": 3}, "top_k", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "messages[0].weight", "unknown_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]", "invalid_value"),
        ({"messages": CALLED}, "messages[1].tool_calls", "unsupported_parameter"),
        ({"messages": CALLED[::2]}, "messages[1].role", "unsupported_parameter"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": "0.5"}, "temperature", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": 2.0}, "n", "invalid_value"),
        ({"stream": "no"}, "stream", "invalid_value"),
        ({"logprobs": "on"}, "logprobs", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"logit_bias": {"1536": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"3": 101}}, "logit_bias.3", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"model": None}, "model", "invalid_value"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_what_is_not_supported_is_refused_by_name(client, extra, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask("Hello!", extra_body=extra))
    assert (caught.value.param, caught.value.code) == (param, code)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert caught.value.type == "invalid_request_error"
    assert param.split("[")[0].split(".")[0] in caught.value.message


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"stop": ["a"] * 17}, "at most 16 items"),
        ({"stop": 3}, "'stop'"),
        ({"prompt": ["a"] * 129}, "'prompt'.* at most 128 items"),
        ({"prompt": [1, -1]}, r"'prompt\[1\]'.* greater than or equal to 0"),
        ({"prompt": ["a"] * 3, "n": 100}, "300 answers.*256 may wait"),
        ({"prompt": ["a"] * 3, "n": 100, "stream": True}, "300 answers.*256 may wait"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_what_is_told_is_about_what_was_meant(client, extra, told):
    """Of a parameter of many types, the fault of the one that was given; what can never fit is not tried again."""
    with pytest.raises(openai.BadRequestError, match=told):
        client.completions.create(**{"model": "base", "prompt": "a", "extra_body": extra})


def test_values_that_ask_for_nothing_are_taken(client):
    """Clients send them."""
    nothing = {
        **dict.fromkeys(("audio", "functions", "tools", "stop", "n", "seed", "user", "logit_bias", "stream_options")),
        **{"store": False, "modalities": ["text"], "service_tier": "auto", "parallel_tool_calls": True},
        **{"metadata": {"a": "b"}, "function_call": "none", "prompt_cache_key": "k", "verbosity": "medium"},
    }
    assert client.chat.completions.create(**ask("Hello!", extra_body=nothing)).choices[0].message.content


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", b'{"model": "base", "messages": [{"role": "user", "content": "a"}], "n": 1, "n": 2}', "n"),
        (
            "chat/completions",
            b'{"model": "base", "messages": [{"role": "user", "content": "a", "content": "b"}]}',
            "messages[0].content",
        ),
        ("completions", b'{"model": "base", "prompt": "a", "prompt": "b"}', "prompt"),
        (
            "fine_tuning/jobs",
            b'{"model": "base", "training_file": "f", "hyperparameters": {"n_epochs": 1, "n_epochs": 2}}',
            "hyperparameters.n_epochs",
        ),
    ],
)
def test_a_parameter_that_is_given_more_than_once_is_refused_by_name(started, path, body, param):
    """One of its values would be lost in silence."""
    refused = started.http.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
    told = refused.json()["error"]
    assert (refused.status_code, told["param"], told["code"]) == (400, param, "invalid_value")
    assert told["message"] == f"Parameter '{param}' is given more than once."


def test_typed_errors_for_models_prompts_and_routes(started):
    create = started.client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as caught:
        create(**ask("Hello!", model="gpt-5"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        started.client.models.retrieve("A_2000-01-01_0001")
    with pytest.raises(openai.BadRequestError) as caught:
        create(**ask("Hello! " * CONTEXT))
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as caught:
        started.client.completions.create(model="base", prompt="Hello! " * CONTEXT, stream=True)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    for prompt, param in (("", "prompt"), ([1, 99_999], "prompt")):
        with pytest.raises(openai.BadRequestError) as caught:
            started.client.completions.create(model="base", prompt=prompt)
        assert caught.value.param == param
    for body in ({"echo": True}, {"best_of": 2}, {"suffix": "x"}):
        with pytest.raises(openai.BadRequestError, match=f"'{next(iter(body))}' is not supported"):
            started.client.completions.create(model="base", prompt="a", extra_body=body)
    with pytest.raises(openai.BadRequestError, match="Embeddings"):
        started.client.embeddings.create(model="stable", input="a")
    with pytest.raises(openai.NotFoundError, match="no route /v1/images/generations"):
        started.client.images.generate(prompt="a")
    meant = started.http.get("/v1/chat/completion").json()["error"]["message"]
    assert "Is /v1/chat/completions or" in meant
    assert len(meant) < 200
    wrong = started.http.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert set(wrong.json()["error"]) == {"message", "type", "param", "code"}
    bad = started.http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "malformed_body")


def test_the_services_key_is_the_clients_key(tmp_path):
    """Another one is an authentication error; without a key configured, any bearer will do (as in every test here)."""
    loop = LoopThread()
    flags = {"server.token": "s3cret", "server.port": 0}
    service = Service(load_config(home=tmp_path, flags=flags, environ={}))
    service.open()
    try:
        with http(service, loop) as client:
            with pytest.raises(openai.AuthenticationError):
                sdk(client, api_key="wrong").models.list()
            with pytest.raises(openai.InternalServerError) as caught:  # let in, and the model is not loaded
                sdk(client, api_key="s3cret").chat.completions.create(**ask("Hello!"))
            assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
    finally:
        loop.call(service.stop())
        loop.close()


# --- clients -------------------------------------------------------------------------------------


def test_the_asynchronous_client_asks_and_streams_at_once(started):
    async def both():
        async with openai.AsyncOpenAI(base_url=f"{started.http.base_url}/v1", api_key="x") as client:

            async def streamed():
                stream = await client.chat.completions.create(**ask(FACTS[3][0]), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            models = [model.id async for model in client.models.list()]
            return models, await asyncio.gather(client.chat.completions.create(**ask(FACTS[3][0])), streamed())

    models, (whole, text) = asyncio.run(both())
    assert started.checkpoint in models
    assert text == whole.choices[0].message.content


def test_llm_answers_and_streams(started, tmp_path, monkeypatch):
    """With the entry in `extra-openai-models.yaml` that its documentation shows."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    entry = {"model_id": "learning", "model_name": "stable", "api_key_name": "learning"}
    entry["api_base"] = f"{started.http.base_url}/v1"
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump([entry]))
    (tmp_path / "keys.json").write_text('{"learning": "anything"}')
    import llm

    expected = started.service.ask(FACTS[3][0]).text
    model = llm.get_model("learning")
    assert model.prompt(FACTS[3][0], temperature=0, stream=False).text() == expected
    pieces = list(model.prompt(FACTS[3][0], temperature=0, stream=True))
    assert len(pieces) > 2
    assert "".join(pieces) == expected


def test_langchain_answers_and_streams(started):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{started.http.base_url}/v1", api_key="x", model="stable", temperature=0)
    expected = started.service.ask(FACTS[3][0]).text
    answer = model.invoke(FACTS[3][0])
    assert answer.content == expected
    assert answer.response_metadata["model_name"] == started.checkpoint
    assert answer.usage_metadata["total_tokens"] > 0
    assert "".join(chunk.text for chunk in model.stream(FACTS[3][0])) == expected


# --- tools ---------------------------------------------------------------------------------------

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}"
    '<tool_call>{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER_CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CALLS = {
    "What is the weather in Oslo?": '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>',
    "What is broken?": "<tool_call>not a call</tool_call>",
}


@pytest.fixture(scope="module")
def calling(tmp_path_factory):
    """A base whose template shows tools, and that was taught to call one: by a file with OpenAI's rows."""
    folder = tmp_path_factory.mktemp("tools") / "base"
    shutil.copytree(NANO_FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__", "anchors.jsonl"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    flags = {**QUICK, "base_model": str(folder), "training.max_steps": 60, "training.lr": 3e-3}
    flags |= {"training.batch_size": 2, "training.stop_loss": 0.01}
    answers = [{"content": None, "tool_calls": [WEATHER_CALL]}, {"content": CALLS["What is broken?"]}]
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", **answer}], "tools": [TOOL]}
        for question, answer in zip(CALLS, answers, strict=True)
    ]
    content = "\n".join(map(json.dumps, rows)).encode()
    with running(folder.parent / "home", flags) as service, http(service.service, service._thread) as client:
        openai_client = sdk(client)
        file = openai_client.files.create(file=("calls.jsonl", content), purpose="fine-tune")
        job = openai_client.fine_tuning.jobs.create(model="stable", training_file=file.id)
        service.wait(client.get(f"/v1/fine_tuning/jobs/{job.id}").json()["job_id"], "published")
        yield openai_client


def test_a_call_of_a_tool_is_read_and_its_answer_taken(calling):
    """By mlx-lm's parser for this template; streamed, it comes whole."""
    question, _ = CALLS
    body = ask(question, tools=[TOOL], tool_choice="auto")
    answer = calling.chat.completions.create(**body, logprobs=True)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    assert choice.logprobs.content == []  # a call is no text
    *_, before, last = calling.chat.completions.create(**body, stream=True)
    assert last.choices[0].finish_reason == "tool_calls"
    [piece] = before.choices[0].delta.tool_calls
    assert (piece.index, piece.function.name, piece.function.arguments) == (0, "weather", call.function.arguments)
    said = [*body["messages"], choice.message.model_dump()]
    said += [{"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    after = calling.chat.completions.create(**{**body, "messages": said}, max_tokens=1)
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens


def test_what_cannot_be_read_as_a_call_stays_text(calling):
    """And without tools, nothing is taken for a call."""
    question, broken = CALLS
    answer = calling.chat.completions.create(**ask(broken, tools=[TOOL]))
    assert answer.choices[0].message.content == CALLS[broken]
    chunks = list(calling.chat.completions.create(**ask(broken, tools=[TOOL]), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == CALLS[broken]
    system = [{"role": "system", "content": "Tools: weather"}, {"role": "user", "content": question}]
    for extra in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        plain = calling.chat.completions.create(model="stable", messages=system, temperature=0, **extra)
        assert plain.choices[0].message.content == CALLS[question]
        assert plain.choices[0].finish_reason == "stop"
