"""Answers as OpenAI shapes them: logprobs, usage, tool calls, and the names of what answered."""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...messages import Answer, TokenLogprob, ToolCall
from ...service import Service


def new_id(prefix: str) -> str:
    """An id that was never given before."""
    return f"{prefix}{secrets.token_hex(16)}"


async def head(service: Service, kind: str, ident: str, checkpoint: str, status: str) -> dict[str, Any]:
    """What an answer and all chunks of a stream begin with."""
    return {
        "id": ident,
        "object": kind,
        "created": int(time.time()),
        "model": checkpoint,
        "system_fingerprint": None if status == "training" else await service.fingerprint(checkpoint),
    }


def headers(checkpoint: str, status: str) -> dict[str, str]:
    """Every answer says what gave it."""
    return {"x-radiance-checkpoint": checkpoint, "x-radiance-checkpoint-status": status}


def usage(answers: Mapping[int, Answer], n: int) -> dict[str, Any]:
    """Of answers by number; every `n` in a row share a prompt, which counts once."""
    first = [answer for number, answer in answers.items() if number % n == 0]
    asked, said = sum(a.prompt_tokens for a in first), sum(a.completion_tokens for a in answers.values())
    return {
        "prompt_tokens": asked,
        "completion_tokens": said,
        "total_tokens": asked + said,
        "prompt_tokens_details": {"cached_tokens": sum(a.cached_tokens for a in first)},
    }


def tool_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls that the model made; one that it gave no id gets one."""
    return [
        {
            "id": call.id or f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


# --- logprobs ------------------------------------------------------------------------------------


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`schemas.ChatLogprobs`."""
    content = [{**_likely(token), "top_logprobs": [_likely(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _likely(token: TokenLogprob) -> dict[str, Any]:
    return {"token": _shown(token), "logprob": token.logprob, "bytes": list(token.data)}


def _shown(token: TokenLogprob) -> str:
    return token.data.decode("utf-8", "replace")


class TextOffsets:
    """`schemas.TextLogprobs`, piece by piece: offsets go on where the last piece ended."""

    def __init__(self) -> None:
        self._data = b""

    def of(self, tokens: Sequence[TokenLogprob], likeliest: int) -> dict[str, Any]:
        """The older form; the token that was drawn is always among its `top_logprobs`."""
        offsets = []
        for token in tokens:
            offsets.append(len(self._data.decode("utf-8", "ignore")))
            self._data += token.data
        top = [{_shown(t): t.logprob for t in (*token.top, token)} for token in tokens]
        return {
            "tokens": [_shown(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top if likeliest else None,
            "text_offset": offsets,
        }
