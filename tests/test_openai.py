"""OpenAI's inference API over a real port, asked by the clients that people have: `openai`, `llm`, LangChain."""

import asyncio
import json
import threading

import openai
import pytest
import yaml
from openai_client import CONTEXT, ask
from openai_client import client as client
from openai_client import started as started
from running import FACTS, REFUSALS, until

from radiance_mlx.config.bases import NANO_FOLDER
from radiance_mlx.errors import Busy, InternalError

#: what makes nano babble in every script it has bytes for
BABBLE = "Grüße aus 東京! 🎉"
WILD = {"temperature": 2.0, "seed": 11, "max_tokens": 60}


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
