"""What OpenAI's inference API refuses here: by the parameter's name, with errors that clients know by type."""

import json

import openai
import pytest
from openai_client import CONTEXT, TOOL, ask, sdk
from openai_client import client as client
from openai_client import started as started
from running import LoopThread, http

from radiance_mlx.config import load_config
from radiance_mlx.service import Service

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
