"""The routes under `/v1`."""

from functools import partial

from ..routing import RouteFacts
from . import files, fine_tuning, schemas, tuning_schemas
from .chat import chat_completion
from .completions import text_completion
from .embeddings import no_embeddings
from .models import get_model, list_models
from .requests import ChatRequest, CompletionRequest
from .tuning_requests import TuningRequest

_Route = partial(RouteFacts, error=schemas.OpenAIErrorAnswer)
#: what a body, an address and a busy or loading service may be answered with
_ASKING = (400, 404, 408, 409, 413, 415, 422, 429, 503)
_ENDING = (404, 409, 503, 507)
_JOB = "/v1/fine_tuning/jobs/{job_id}"
_PAGE = {"after": "string", "limit": {"type": "integer", "minimum": 1, "maximum": 100}}
_FILES = {
    "after": "string",
    "limit": {"type": "integer", "minimum": 1, "maximum": 10_000},
    "order": {"enum": ["asc", "desc"]},
    "purpose": "string",
}
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": files.PURPOSE}},
    "additionalProperties": False,
}

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
    _Route("GET", "/v1/models/{model:path}", get_model, schemas.ModelInfo, errors=(404, 409, 503)),
    _Route(
        "POST",
        "/v1/files",
        files.upload_file,
        tuning_schemas.FileInfo,
        form=_UPLOAD,
        errors=(400, 408, 413, 415, 503, 507),
    ),
    _Route("GET", "/v1/files", files.list_files, tuning_schemas.FileList, query=_FILES, errors=(400, 503)),
    _Route("GET", "/v1/files/{file_id}", files.get_file, tuning_schemas.FileInfo, errors=(404, 503)),
    _Route("DELETE", "/v1/files/{file_id}", files.delete_file, tuning_schemas.FileDeleted, errors=(404, 503, 507)),
    _Route(
        "GET",
        "/v1/files/{file_id}/content",
        files.file_content,
        tuning_schemas.FileInfo,
        media="application/octet-stream",
        errors=(404, 503),
    ),
    _Route(
        "POST",
        "/v1/fine_tuning/jobs",
        fine_tuning.create_tuning,
        tuning_schemas.TuningJob,
        body=TuningRequest,
        idempotent=True,
        errors=(400, 404, 408, 409, 413, 415, 503, 507),
    ),
    _Route(
        "GET",
        "/v1/fine_tuning/jobs",
        fine_tuning.list_tunings,
        tuning_schemas.TuningJobs,
        query=_PAGE,
        errors=(400, 503),
    ),
    _Route("GET", _JOB, fine_tuning.get_tuning, tuning_schemas.TuningJob, errors=(404, 503)),
    _Route("POST", f"{_JOB}/cancel", fine_tuning.cancel_tuning, tuning_schemas.TuningJob, errors=_ENDING),
    _Route("POST", f"{_JOB}/pause", fine_tuning.pause_tuning, tuning_schemas.TuningJob, errors=_ENDING),
    _Route("POST", f"{_JOB}/resume", fine_tuning.resume_tuning, tuning_schemas.TuningJob, errors=_ENDING),
    _Route(
        "GET",
        f"{_JOB}/events",
        fine_tuning.tuning_events,
        tuning_schemas.TuningEvents,
        query={**_PAGE, "stream": {"enum": ["true", "false"]}},
        streams=True,
        chunk=tuning_schemas.TuningEvent,
        errors=(400, 404, 503),
    ),
    _Route(
        "GET",
        f"{_JOB}/checkpoints",
        fine_tuning.tuning_checkpoints,
        tuning_schemas.TuningCheckpoints,
        query=_PAGE,
        errors=(400, 404, 503),
    ),
    _Route("POST", "/v1/embeddings", no_embeddings, schemas.OpenAIErrorAnswer, status=400, body=schemas.AnyBody),
)
