"""The one kind of body that is not JSON: an upload, bounded like all others."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from ...config.schema import ServerSection
from ...errors import MalformedBody, UnsupportedMediaType
from ..bodies import content_of
from .errors import BadParameter

KIND = "multipart/form-data"


@dataclass(frozen=True)
class Uploaded:
    """A file and the fields beside it."""

    filename: str
    content: bytes
    fields: dict[str, str]


class _Parser(MultiPartParser):
    """That knows whether the body `ended` with its mark: one that breaks off is read without what was cut."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


def _charset(request: Request) -> str:
    _, options = parse_options_header(request.headers.get("content-type", ""))
    return options.get(b"charset", b"").decode("latin-1").strip().lower()


async def read_upload(request: Request, settings: ServerSection, fields: tuple[str, ...]) -> Uploaded:
    """The `file` and such of `fields` as there are.

    Raises `UnsupportedMediaType`, `PayloadTooLarge`, `RequestTimeout`, `MalformedBody`, `BadParameter`.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != KIND:
        raise UnsupportedMediaType(f"The content type is {kind or 'missing'}.", f"Send '{KIND}'.")
    if (charset := _charset(request)) not in ("", "utf-8", "us-ascii"):
        raise UnsupportedMediaType(f"The charset of the upload's names is {charset}.", "Send UTF-8, or say none.")
    body = await content_of(request, settings)

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = _Parser(request.headers, stream(), max_files=1, max_fields=len(fields) + 4)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise MalformedBody(f"The upload cannot be read: {error.message}") from None
    except UnicodeError:
        raise MalformedBody("The names in the upload are not in the charset that its content type says.") from None
    if not parser.ended:
        await form.close()
        raise MalformedBody("The upload breaks off: the mark of its end is missing.", "Send it again, whole.")
    file, found = None, dict[str, str]()
    for name, value in form.multi_items():
        if name == "file" and isinstance(value, UploadFile):
            file = Uploaded(value.filename or "", await value.read(), found)
        elif name in found:
            raise BadParameter(name, f"Parameter '{name}' is given twice.")
        elif name in fields and isinstance(value, str):
            found[name] = value
        elif name not in (*fields, "file"):
            raise BadParameter(name, f"Unknown parameter: '{name}'.", code="unknown_parameter")
    await form.close()
    if file is None:
        raise BadParameter("file", "Missing required parameter: 'file', a file.", code="missing_required_parameter")
    return file
