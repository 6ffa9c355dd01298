"""Bodies of `/v1/chat/completions` and `/v1/completions`, as OpenAI describes them.

What this service does not do is declared with the values that ask for nothing (null, false, "auto"), so that any
other value is refused by name: `REFUSED` of each says why.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ...messages import Sampling, Tools, as_call
from ...rows.turns import ROLES, check
from ..repeated import Place, repeated_keys
from ..schemas import Text
from .parsing import OpenAIBody

MOST = 1_000_000  # tokens: more than any context
SEEDS = 2**63
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Tokens = Annotated[int, Field(ge=1, le=MOST)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]


class StreamOptions(OpenAIBody):
    """With `include_usage` one more chunk tells the tokens; nothing obfuscates here."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Drawing(OpenAIBody):
    """How answers are drawn, in both kinds of request."""

    model: Text
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^(0|[1-9]\d{0,9})$")], Bias] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _options_of_streams(self) -> "Drawing":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is for 'stream': true")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        """For the service; what is not said is as for `/search`."""
        default = Sampling()
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=default.temperature if self.temperature is None else self.temperature,
            top_p=default.top_p if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stop),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            logprobs=logprobs,
        )


# --- chat ----------------------------------------------------------------------------------------


class TextPart(OpenAIBody):
    """A part of a message: text alone is taken."""

    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        if given != "text":
            raise ValueError(f"parts of type {given!r} are not supported: the model reads text alone")
        return given


Content = str | list[TextPart]
#: what is raised of a text that is no JSON, or nested too deeply to be read as such
_NO_JSON = (ValueError, RecursionError)


class FunctionCalled(OpenAIBody):
    name: Text
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _has_each_key_once(cls, written: str) -> str:
        """The chat template takes the object that it is; what is no JSON goes there as it is."""
        repeated: list[Place] = []
        with contextlib.suppress(*_NO_JSON):
            repeated = repeated_keys(written.encode())
        if repeated:
            key = ".".join(map(str, repeated[0])).encode(errors="replace").decode()  # half a surrogate pair is no text
            raise ValueError(f"the key '{key}' is given more than once")
        return written


class ToolCalled(OpenAIBody):
    """A call that the model made before; its arguments are JSON."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCalled


class ChatMessage(OpenAIBody):
    """One turn. Assistants may have called tools; a `tool` says what came of a call."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Text | None = None
    tool_calls: list[ToolCalled] | None = None
    tool_call_id: Text | None = None
    reasoning_content: str | None = None
    # clients send these back as they got them
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing: only an assistant that calls tools may have none")
        if (self.tool_calls or self.reasoning_content) and self.role != "assistant":
            raise ValueError("only an assistant calls tools and reasons")
        if (self.tool_call_id is None) != (self.role != "tool"):
            raise ValueError("a tool's message has the tool_call_id that it answers, and no other has")
        return self

    @property
    def turn(self) -> tuple[str, str]:
        """(role, content) for the chat template."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content or ()]
        return ROLES.get(self.role, self.role), "".join(parts)

    def beside(self) -> dict[str, Any]:
        """What else the chat template is told."""
        told = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_content}
        found: dict[str, Any] = {key: value for key, value in told.items() if value is not None}
        if self.tool_calls:
            called = [(call.id, call.function) for call in self.tool_calls]
            found["tool_calls"] = [as_call(one.name, _object(one.arguments), call_id) for call_id, one in called]
        return found


def _object(written: str) -> Any:
    """Arguments as templates want them; what the model wrote that is no JSON goes back to it as it was.

    So does what a template or a tokenizer would stumble over: half a surrogate pair, say.
    """
    try:
        found = json.loads(written)
        check(found)
        return found
    except _NO_JSON:
        return written


class FunctionDefinition(OpenAIBody):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class ToolDefinition(OpenAIBody):
    type: Literal["function"]
    function: FunctionDefinition

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class ResponseFormat(OpenAIBody):
    """`json_object`: an answer that is no JSON object is an error, and no answer."""

    type: Literal["text", "json_object"]


class ChatRequest(Drawing):
    """`POST /v1/chat/completions`."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "audio": "the model writes text.",
        "modalities": "the model writes text, and nothing else.",
        "prediction": "nothing is gained from a predicted answer.",
        "store": "answers are not kept.",
        "web_search_options": "the service searches nothing.",
        "functions": "it was replaced by 'tools'.",
        "function_call": "it was replaced by 'tool_choice'.",
        "parallel_tool_calls": "the model decides how many tools it calls.",
        "tool_choice": "the model decides whether it calls a tool: only 'auto' and 'none' can be kept.",
        "reasoning_effort": "how long the model reasons is up to its chat template (model.chat_template_args).",
        "verbosity": "ask for it in the prompt.",
        "service_tier": "there is one tier.",
        "moderation": "nothing is moderated.",
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    response_format: ResponseFormat | None = None
    # without effect here, and harmless
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # what is not done here, with the values that do not ask for it
    store: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: Literal[True] | None = None
    service_tier: Literal["auto", "default"] | None = None
    verbosity: Literal["medium"] | None = None
    reasoning_effort: None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    moderation: None = None
    functions: None = None
    function_call: Literal["none"] | None = None

    @field_validator("response_format", mode="before")
    @classmethod
    def _known_format(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("type") == "json_schema":
            raise ValueError(
                "'json_schema' is not supported, since nothing here makes the model keep to a schema; with "
                "'json_object' what is no JSON object is refused"
            )
        return given

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("'max_tokens' and 'max_completion_tokens' are two names for one thing: give one")
        return self

    @property
    def wanted_tools(self) -> list[ToolDefinition]:
        """None when the model is not to call any."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def as_json(self) -> bool:
        """Whether the answer must be a JSON object."""
        return self.response_format is not None and self.response_format.type == "json_object"

    def template(self) -> Tools | None:
        """What the chat template is told beside roles and contents; None: nothing."""
        functions = tuple(tool.as_dict() for tool in self.wanted_tools)
        beside = tuple(message.beside() for message in self.messages)
        return Tools(functions, beside) if functions or any(beside) else None

    def as_sampling(self) -> Sampling:
        """Without a limit, an answer may fill the context."""
        limit = self.max_completion_tokens or self.max_tokens or MOST
        return self.sampling(limit, (self.top_logprobs or 0) if self.logprobs else None)


# --- completions ---------------------------------------------------------------------------------

Token = Annotated[int, Field(ge=0, lt=2**31)]
TokenList = Annotated[list[Token], Field(min_length=1)]


class CompletionRequest(Drawing):
    """`POST /v1/completions`: bare text, or tokens, to be continued; without a chat template."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "echo": "prompts are not repeated.",
        "best_of": "every answer that is drawn is returned: use 'n'.",
        "suffix": "text is continued at its end only.",
    }

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | TokenList
        | Annotated[list[TokenList], Field(min_length=1, max_length=128)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each one to be continued."""
        given: Any = self.prompt
        single = isinstance(given, str) or isinstance(given[0], int)
        return [given] if single else list(given)

    def as_sampling(self) -> Sampling:
        """OpenAI's default of 16 tokens."""
        return self.sampling(self.max_tokens or 16, self.logprobs)
