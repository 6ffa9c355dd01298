"""`POST /v1/completions`: bare text, continued."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...messages import Answer, Generate, TextDelta
from ...service import Service
from ..routing import service_of
from ..writing import JSONResponse
from . import shapes
from .asking import addressed, answers_to, pieces_of, several
from .errors import BadParameter
from .parsing import parsed
from .requests import CompletionRequest
from .stream import streamed


async def text_completion(request: Request) -> Response:
    """Continue texts, or tokens, as they are: no chat template is put around them."""
    service = service_of(request)
    body = await parsed(request, CompletionRequest)
    question = await addressed(service, body.model, body.as_sampling())
    asked = [await _continuing(service, question, prompt) for prompt in body.prompts]
    n = body.n or 1
    questions = await several(service, asked, n)
    ident = shapes.new_id("cmpl-")
    if body.stream:
        return await streamed(
            request,
            service,
            pieces_of(service, questions),
            kind="text_completion",
            ident=ident,
            choices=TextChoices(body.logprobs),
            n=n,
            include_usage=body.include_usage,
        )
    answers = await answers_to(request, service, questions)
    came = answers[0]
    document = {
        **await shapes.head(service, "text_completion", ident, came.checkpoint, came.checkpoint_status),
        "choices": [_choice(number, answer, body.logprobs) for number, answer in enumerate(answers)],
        "usage": shapes.usage(dict(enumerate(answers)), n),
    }
    return JSONResponse(document, headers=shapes.headers(came.checkpoint, came.checkpoint_status))


async def _continuing(service: Service, question: Generate, prompt: str | list[int]) -> Generate:
    """Raises `BadParameter`, `PromptTooLong`."""
    assert service.facts is not None
    tokens = await service.tokens(prompt) if isinstance(prompt, str) else tuple(prompt)
    if not tokens:
        raise BadParameter("prompt", "The prompt is empty: there is nothing to continue.")
    if max(tokens) >= service.facts.vocab_size:
        raise BadParameter(
            "prompt", f"'prompt' has the token {max(tokens)}; this model's are 0 to {service.facts.vocab_size - 1}."
        )
    return replace(question, prompt=tokens)


def _choice(number: int, answer: Answer, likeliest: int | None) -> dict[str, Any]:
    told = None if likeliest is None else shapes.TextOffsets().of(answer.logprobs, likeliest)
    return {"index": number, "text": answer.text, "logprobs": told, "finish_reason": answer.finish_reason}


class TextChoices:
    """Chunks' choices for what comes."""

    def __init__(self, likeliest: int | None) -> None:
        self._likeliest = likeliest
        self._offsets: dict[int, shapes.TextOffsets] = {}

    def __call__(self, number: int, came: TextDelta | Answer) -> Iterator[dict[str, Any]]:
        if isinstance(came, Answer):
            yield {"index": number, "text": "", "logprobs": None, "finish_reason": came.finish_reason}
            return
        told = None
        if self._likeliest is not None and came.logprobs:
            offsets = self._offsets.setdefault(number, shapes.TextOffsets())
            told = offsets.of(came.logprobs, self._likeliest)
        yield {"index": number, "text": came.text, "logprobs": told, "finish_reason": None}
