"""Accepted examples as files that `mlx_lm.lora --data` trains on. Pure.

mlx-lm looks at the first row to tell a file's format, so a file never mixes formats: chats and
prompt/completion pairs together become `messages`; plain text among them goes to a file of its own. Rows with `tools`
are `messages` rows too. mlx-lm reads past the `weight` of a message.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from .messages import Example


def curated_files(examples: Sequence[Example]) -> dict[str, bytes]:
    """File name → JSONL: `train.jsonl`, and `text.jsonl` when text stands beside chats."""
    texts = [e.as_dict() for e in examples if not e.messages]
    chats = [e for e in examples if e.messages]
    pairs = [e.as_dict() for e in chats]
    if any("messages" in row for row in pairs):
        pairs = [e.as_messages() for e in chats]
    if not pairs:
        return {"train.jsonl": _jsonl(texts)}
    files = {"train.jsonl": _jsonl(pairs)}
    return {**files, "text.jsonl": _jsonl(texts)} if texts else files


def data_hash(examples: Sequence[Example]) -> str:
    """sha256 over the examples in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.as_dict(), sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
