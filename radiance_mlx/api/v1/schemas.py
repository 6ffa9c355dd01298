"""Bodies of answers under `/v1`, as OpenAI describes them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class OpenAIError(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorAnswer(BaseModel):
    """Every error under `/v1` has this shape."""

    error: OpenAIError


class PromptDetails(BaseModel):
    cached_tokens: int


class TokenUsage(BaseModel):
    """Of the whole request; `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class LikelyToken(BaseModel):
    """A token as text; where it is a part of a character, `bytes` has what `token` cannot show."""

    token: str
    logprob: float
    bytes: list[int]


class DrawnToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """Natural logarithms of the model's own probabilities."""

    content: list[DrawnToken]
    refusal: None


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCallMade(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatAnswerMessage(BaseModel):
    """`content` is null if tools were called and nothing said; models that reason give `reasoning_content`."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallMade] | None = None
    reasoning_content: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """`model` is the checkpoint that answered, `system_fingerprint` tells its weights (null: they are in training)."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: TokenUsage


class ToolCallPiece(ToolCallMade):
    index: int


class ChatDelta(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallPiece] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatCompletionChunk(BaseModel):
    """A piece of a streamed answer; with `include_usage` the last one has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChunkChoice]
    usage: TokenUsage | None = None


class TextLogprobs(BaseModel):
    """In the older form; offsets are characters of the answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextChunkChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletionChunk(BaseModel):
    """A piece of a streamed answer."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[TextChunkChoice]
    usage: TokenUsage | None = None


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[TextChoice]
    usage: TokenUsage


class ModelInfo(BaseModel):
    """`checkpoint` is what answers to this id now."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    checkpoint: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelInfo]


class AnyBody(BaseModel):
    """Not looked at."""

    model_config = ConfigDict(extra="allow")

    input: Any = None
