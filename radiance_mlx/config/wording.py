"""What is wrong with a value, in the words of `config.yaml`: pydantic's own speak of classes and schemas."""

import re
from collections.abc import Sequence
from typing import Any

_NUMBER, _WHOLE, _BOOLEAN = "a number", "a whole number", "true or false"
#: pydantic's type of fault → what the value must be
_EXPECTED = {
    "model_type": "a section, with keys of its own",
    "dict_type": "keys and values",
    "list_type": "a list",
    "string_type": "text",
    "string_unicode": "text",
    "invalid_key": "text",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing_size": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "bool_type": _BOOLEAN,
    "bool_parsing": _BOOLEAN,
}


def problem_of(fault: Any, below: Sequence[int | str]) -> str:
    """One of pydantic's `errors()` in plain words; `below` is its path from the key on (a list's entry)."""
    said = str(fault["msg"])
    if fault["type"] == "value_error":
        return said.removeprefix("Value error, ")
    expected = _EXPECTED.get(fault["type"])
    said = f"must be {expected}" if expected else re.sub(r"^\w+ should ", "must ", said)
    return f"{_entry(below)}{said} (got {fault['input']!r})"


def _entry(below: Sequence[int | str]) -> str:
    if "[key]" in below:
        return "each key "
    return f"entry {below[0] + 1} " if below and isinstance(below[0], int) else ""
