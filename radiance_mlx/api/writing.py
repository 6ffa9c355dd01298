"""JSON as it is sent."""

import json
from typing import Any

from starlette import responses


class JSONResponse(responses.JSONResponse):
    """In UTF-8, whatever text is told of: a file's name, say, may have bytes that are none."""

    def render(self, content: Any) -> bytes:
        return written(content).encode()


def written(content: Any) -> str:
    """`content` as JSON; a half of a surrogate pair, which no UTF-8 can hold, is a question mark."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="replace").decode()
