"""The routes under `/v1`."""

from functools import partial

from ..routing import RouteFacts
from . import schemas
from .chat import chat_completion
from .completions import text_completion
from .models import get_model, list_models, no_embeddings
from .requests import ChatRequest, CompletionRequest

_Route = partial(RouteFacts, error=schemas.OpenAIErrorAnswer)
#: what a body, an address and a busy or loading service may be answered with
_ASKING = (400, 404, 408, 409, 413, 415, 422, 429, 503)

TABLE: tuple[RouteFacts, ...] = (
    _Route(
        "POST",
        "/v1/chat/completions",
        chat_completion,
        schemas.ChatCompletion,
        body=ChatRequest,
        streams=True,
        chunk=schemas.ChatCompletionChunk,
        errors=_ASKING,
    ),
    _Route(
        "POST",
        "/v1/completions",
        text_completion,
        schemas.TextCompletion,
        body=CompletionRequest,
        streams=True,
        chunk=schemas.TextCompletionChunk,
        errors=_ASKING,
    ),
    _Route("GET", "/v1/models", list_models, schemas.ModelList, errors=(503,)),
    _Route("GET", "/v1/models/{model:path}", get_model, schemas.ModelInfo, errors=(404, 503)),
    _Route("POST", "/v1/embeddings", no_embeddings, schemas.OpenAIErrorAnswer, status=400, body=schemas.AnyBody),
)
