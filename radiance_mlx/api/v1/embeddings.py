"""`POST /v1/embeddings`: what this service does not have."""

from starlette.requests import Request
from starlette.responses import Response

from .errors import BadParameter


async def no_embeddings(request: Request) -> Response:
    """Refused: this service answers and learns, and makes no embeddings."""
    raise BadParameter(
        None,
        "Embeddings are not made here: the model that is loaded writes text.",
        "Ask a service that has an embedding model.",
        "unsupported_endpoint",
    )
