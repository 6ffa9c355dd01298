"""Arguments of calls that a model made before: JSON in a text, which the chat template gets as an object."""

import json

import pytest

from radiance_mlx.api.v1.errors import BadParameter
from radiance_mlx.api.v1.parsing import parse_openai
from radiance_mlx.api.v1.requests import ChatRequest


def chat(arguments):
    """A conversation in which a tool has been called with `arguments`, as it is read."""
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Where is my key?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "under the mat"},
    ]
    return parse_openai(ChatRequest, json.dumps({"model": "stable", "messages": messages}).encode())


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "a"),
        ('{"a": [1, {"b": 1, "b": 2}]}', "a.1.b"),
        ('[{"\\u0061": 1, "a": 1}]', "0.a"),
        ('{"\\ud800": 1, "\\ud800": 1}', "?"),
    ],
)
def test_a_key_that_is_there_twice_is_refused_as_in_the_body(arguments, key):
    """All but its last value would be lost in silence."""
    with pytest.raises(BadParameter) as caught:
        chat(arguments)
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"
    assert (caught.value.status, caught.value.code) == (400, "invalid_value")
    assert f"the key '{key}' is given more than once" in caught.value.message


@pytest.mark.parametrize("written", ["", "{broken", '{"a": 1, "a": 2', "[" * 100_000, '{"a": "\\ud800"}', '{"a": NaN}'])
def test_what_is_no_json_goes_back_to_the_model_as_it_wrote_it(written):
    """Nor is it where it is nested beyond what can be read, or holds what no tokenizer takes."""
    [call] = chat(written).messages[1].beside()["tool_calls"]
    assert call["function"]["arguments"] == written


def test_sound_arguments_are_an_object():
    """One key in several objects is no repetition."""
    [call] = chat('{"a": {"b": 1}, "b": [{"a": 1}, {"a": 2}]}').messages[1].beside()["tool_calls"]
    assert call["function"]["arguments"] == {"a": {"b": 1}, "b": [{"a": 1}, {"a": 2}]}
