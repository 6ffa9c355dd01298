"""Reading bodies of OpenAI's requests: the first fault is told, with the parameter that it is about."""

import re
from collections.abc import Mapping
from typing import ClassVar, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from ...errors import MalformedBody
from ..bodies import read_body
from ..repeated import repeated_keys
from ..routing import service_of
from ..schemas import Body
from .errors import BadParameter


class OpenAIBody(Body):
    """A body, or a part of one. Types are as described: "2" is no number, and 2.0 no whole one; 2 is a number.

    `REFUSED` has, for parameters that ask for what is not done here, why that is so.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    REFUSED: ClassVar[Mapping[str, str]] = {}


M = TypeVar("M", bound=OpenAIBody)
#: faults of what has the right type: of a parameter of many types, it is this one that was meant
_OF_VALUES = frozenset(
    {
        *("greater_than", "greater_than_equal", "less_than", "less_than_equal"),
        *("too_short", "too_long", "string_too_short", "string_too_long", "string_pattern_mismatch"),
    }
)
#: parts of a fault's place that name a type, and no parameter
_TYPE = re.compile(r"[\[(]|^(str|int|float|bool|none|dict|constrained-.*)$|^[A-Z]|-")


async def parsed(request: Request, model: type[M], *, optional: bool = False) -> M:
    """The request's body as `model`. Raises `RadianceError`."""
    return parse_openai(model, await read_body(request, service_of(request).config.server, optional=optional))


def parse_openai(model: type[M], body: bytes) -> M:
    """`body` as `model`. Raises `MalformedBody` or `BadParameter`."""
    try:
        parsed = model.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error, model.REFUSED) from None
    if places := repeated_keys(body):
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in places[0]).removeprefix(".")
        raise BadParameter(param, f"Parameter '{param}' is given more than once.")
    return parsed


def _explained(error: ValidationError, refused: Mapping[str, str]) -> MalformedBody | BadParameter:
    """The fault of the type that was meant: one of the value itself, else the one that lies deepest."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    first = next((fault for fault in faults if fault["type"] == "json_invalid"), None)
    if first is not None:
        return MalformedBody(f"The body is not JSON in UTF-8: {first['msg']}", "Check quotes and commas.")
    place = faults[0]["loc"][:1]
    return _told(max((f for f in faults if f["loc"][:1] == place), key=_meant), refused)


def _meant(fault: ErrorDetails) -> tuple[bool, int, bool]:
    """The greater, the likelier it is that the fault is of the type that was meant."""
    return fault["type"] in _OF_VALUES, len(fault["loc"]), fault["type"] != "literal_error"


def _told(fault: ErrorDetails, refused: Mapping[str, str]) -> BadParameter:
    param = _path(fault["loc"])
    problem = fault["msg"].removeprefix("Value error, ")
    name = str(fault["loc"][0]) if fault["loc"] else ""
    if fault["type"] == "extra_forbidden":
        return BadParameter(
            param, f"Unknown parameter: '{param}'.", "GET /openapi.json describes what is taken.", "unknown_parameter"
        )
    if fault["type"] == "missing":
        return BadParameter(param, f"Missing required parameter: '{param}'.", code="missing_required_parameter")
    if name in refused and (len(fault["loc"]) == 1 or name != "messages"):
        return BadParameter.unsupported(param or name, refused[name])
    code = "unsupported_value" if "not supported" in problem else "invalid_value"
    if param is None:  # of several together: the first that is named
        named = re.match(r"'(\w+)'", problem)
        return BadParameter(named and named[1], f"{problem}.", code=code)
    return BadParameter(param, f"Invalid value for '{param}': {problem}.", code=code)


def _path(place: tuple[int | str, ...]) -> str | None:
    path = ""
    for part in place:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not _TYPE.search(part):
            path += f".{part}" if path else part
    return path or None
