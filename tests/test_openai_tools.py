"""Tools through OpenAI's inference API, on a base that was taught to call one."""

import json
import shutil

import pytest
from openai_client import TOOL, ask, sdk
from running import QUICK, http, running

from radiance_mlx.config.bases import NANO_FOLDER

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
