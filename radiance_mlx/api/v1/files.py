"""`/v1/files`: training data, kept until it is deleted."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...errors import InvalidRequest, PayloadTooLarge
from ...messages import Example
from ...rows.intake import examples_of_upload
from ...service import Service
from ...store import UploadRecord
from ..routing import service_of
from ..writing import JSONResponse
from . import shapes
from .errors import BadParameter
from .multipart import read_upload
from .paging import chosen, page

PURPOSE = "fine-tune"
LONGEST_NAME = 255


async def upload_file(request: Request) -> Response:
    """Keep a file of JSONL, JSON, CSV or TSV, once every row of it has been found sound."""
    service = service_of(request)
    uploaded = await read_upload(request, service.config.server, ("purpose",))
    purpose = uploaded.fields.get("purpose")
    if purpose is None:
        raise BadParameter("purpose", "Missing required parameter: 'purpose'.", code="missing_required_parameter")
    if purpose != PURPOSE:
        raise BadParameter(
            "purpose", f"'purpose' {purpose!r} is not supported: files are for '{PURPOSE}'.", code="unsupported_value"
        )
    if not 1 <= len(uploaded.filename) <= LONGEST_NAME:
        raise BadParameter("file", f"The file must have a name of 1 to {LONGEST_NAME} characters.")
    try:
        examples = await examples_of_file(service, uploaded.content, uploaded.filename)
    except (InvalidRequest, PayloadTooLarge) as error:
        raise BadParameter(
            "file", f"The file cannot be used, and was not kept: {error.message}", error.hint, "invalid_file"
        ) from None
    record = await service.tuning.upload(uploaded.filename, purpose, uploaded.content, len(examples))
    return JSONResponse(file_body(record), headers=shapes.headers(*service.current))


async def examples_of_file(service: Service, content: bytes, name: str) -> list[Example]:
    """Every answer of every row that `update` takes too. Raises `InvalidRequest`, `PayloadTooLarge`."""
    most = service.config.server.max_body_mb
    return await asyncio.to_thread(examples_of_upload, content, name, max_body_mb=most)  # takes seconds


async def list_files(request: Request) -> Response:
    """The files that are kept."""
    service = service_of(request)
    files = await service.tuning.files()
    if chosen(request, "order", "desc", ("asc", "desc")) == "asc":
        files.reverse()
    purpose = request.query_params.get("purpose")
    found = [file for file in files if purpose in (None, file.purpose)]
    listed = page(request, found, file_body, limit=10_000, most=10_000)
    return JSONResponse(listed, headers=shapes.headers(*service.current))


async def get_file(request: Request) -> Response:
    """One of them."""
    service = service_of(request)
    record = await service.tuning.file(request.path_params["file_id"])
    return JSONResponse(file_body(record), headers=shapes.headers(*service.current))


async def delete_file(request: Request) -> Response:
    """Forget a file. Jobs that were made of it are not concerned: they have its examples."""
    service = service_of(request)
    file_id = request.path_params["file_id"]
    await service.tuning.delete(file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True}, headers=shapes.headers(*service.current))


async def file_content(request: Request) -> Response:
    """What was uploaded, byte for byte."""
    service = service_of(request)
    content = await service.tuning.content(request.path_params["file_id"])
    return Response(content, media_type="application/octet-stream", headers=shapes.headers(*service.current))


def file_body(record: UploadRecord) -> dict[str, Any]:
    """`schemas.FileInfo`."""
    return {
        "id": record.file_id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": int(record.created),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "examples": record.examples,
    }
