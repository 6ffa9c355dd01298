"""`POST /v1/chat/completions`."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...messages import Answer, TextDelta
from ...service import Service
from ..routing import service_of
from ..writing import JSONResponse
from . import shapes
from .asking import addressed, answers_to, pieces_of, several
from .errors import BadParameter, NotAsAsked
from .parsing import parsed
from .requests import ChatRequest
from .stream import streamed


async def chat_completion(request: Request) -> Response:
    """Answer a chat as OpenAI does; with `stream: true` in chunks."""
    service = service_of(request)
    body = await parsed(request, ChatRequest)
    question = await addressed(service, body.model, body.as_sampling())
    if body.wanted_tools and not (service.facts and service.facts.tools):
        raise BadParameter.unsupported(
            "tools", "this model's chat template shows it none, or how it calls them is not known."
        )
    await _require_place_for_calls(service, body)
    question = replace(question, messages=tuple(m.turn for m in body.messages), tools=body.template())
    n = body.n or 1
    questions = await several(service, [question], n)
    ident = shapes.new_id("chatcmpl-")
    if body.stream:
        return await streamed(
            request,
            service,
            pieces_of(service, questions),
            kind="chat.completion.chunk",
            ident=ident,
            choices=ChatChoices(body),
            n=n,
            include_usage=body.include_usage,
        )
    answers = await answers_to(request, service, questions)
    came = answers[0]
    document = {
        **await shapes.head(service, "chat.completion", ident, came.checkpoint, came.checkpoint_status),
        "choices": [_choice(number, answer, body) for number, answer in enumerate(answers)],
        "usage": shapes.usage(dict(enumerate(answers)), n),
    }
    return JSONResponse(document, headers=shapes.headers(came.checkpoint, came.checkpoint_status))


async def _require_place_for_calls(service: Service, body: ChatRequest) -> None:
    """Raises `BadParameter` if a call of a tool, or what came of one, would be left out of the prompt in silence."""
    called = [
        f"messages[{place}].{'tool_calls' if message.tool_calls else 'role'}"
        for place, message in enumerate(body.messages)
        if message.tool_calls or message.role == "tool"
    ]
    if called and not await service.shows_tools():
        raise BadParameter.unsupported(
            called[0], "this model's chat template shows no calls of tools.", "Say it in the text of another message."
        )


def _choice(number: int, answer: Answer, body: ChatRequest) -> dict[str, Any]:
    _require_form(answer, body)
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.tool_calls:
        message |= {"content": answer.text or None, "tool_calls": shapes.tool_calls(answer.tool_calls)}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    logprobs = shapes.chat_logprobs(answer.logprobs) if body.logprobs else None
    return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": _reason(answer)}


def _reason(answer: Answer) -> str:
    return "tool_calls" if answer.tool_calls and answer.finish_reason == "stop" else answer.finish_reason


def _require_form(answer: Answer, body: ChatRequest) -> None:
    """Raises `NotAsAsked`. An answer that was cut short is told as such, as OpenAI does."""
    if not body.as_json or answer.finish_reason == "length" or answer.tool_calls:
        return
    try:
        fits = isinstance(json.loads(answer.text), dict)
    except ValueError:
        fits = False
    if not fits:
        raise NotAsAsked(
            "The model was to answer with a JSON object, and did not.",
            "Tell it in the prompt which object you want, teach it with examples, or try again.",
        )


class ChatChoices:
    """Chunks' choices for what comes: the role first, then pieces, then why it ended."""

    def __init__(self, body: ChatRequest) -> None:
        self._body = body
        self._calls: dict[int, int] = {}  # how many tool calls each choice has; it has begun if it is here

    def __call__(self, number: int, came: TextDelta | Answer) -> Iterator[dict[str, Any]]:
        if number not in self._calls:
            self._calls[number] = 0
            yield _chunk(number, {"role": "assistant", "content": "", "refusal": None})
        if isinstance(came, Answer):
            _require_form(came, self._body)
            yield _chunk(number, {}, reason=_reason(came))
            return
        delta = self._delta(number, came)
        if delta or came.logprobs:
            told = shapes.chat_logprobs(came.logprobs) if came.logprobs else None
            yield _chunk(number, delta, told)

    def _delta(self, number: int, came: TextDelta) -> dict[str, Any]:
        delta: dict[str, Any] = {"reasoning_content": came.reasoning} if came.reasoning else {}
        if came.text:
            delta["content"] = came.text
        if came.tool_calls:
            first = self._calls[number]
            self._calls[number] += len(came.tool_calls)
            calls = shapes.tool_calls(came.tool_calls)
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls, first)]
        return delta


def _chunk(
    number: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
