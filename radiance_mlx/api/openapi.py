"""`/openapi.json`, made from the route table and the models that validate."""

from typing import Any

from pydantic.json_schema import models_json_schema

from .. import __version__
from . import routes
from .routing import RouteFacts
from .v1 import table

OWN_PATH = "/openapi.json"
TABLE = (*routes.TABLE, *table.TABLE)
_REF = "#/components/schemas/{model}"


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document of every route."""
    models = {model for facts in TABLE for model in (facts.answer, facts.body, facts.error, facts.chunk) if model}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schemas = models_json_schema([(m, "validation") for m in ordered], ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for facts in TABLE:
        paths.setdefault(shown(facts.path), {})[facts.method.lower()] = _operation(facts)
    paths[OWN_PATH] = {
        "get": {
            "summary": "This document.",
            "operationId": "openapi",
            "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": {}}}}},
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "radiance_mlx", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(facts: RouteFacts) -> dict[str, Any]:
    responses = {str(facts.status): _content("OK", _ref(facts.answer.__name__))}
    if facts.media != "application/json":
        responses[str(facts.status)]["content"] = {facts.media: {"schema": {"type": "string", "format": "binary"}}}
    if facts.streams:
        responses["200"]["content"]["text/event-stream"] = _events(facts)
    if facts.handler.__name__ == "cancel_job":
        responses["202"] = _content("Its training is being stopped", _ref("Job"))
    unready = facts.path == "/readyz"
    for status in (*facts.errors, *(() if facts.path.endswith("z") else (401, 403))):
        responses[str(status)] = _content("Error", _ref("Health" if unready else facts.error.__name__))
    operation: dict[str, Any] = {
        "summary": (facts.handler.__doc__ or "").strip(),
        "operationId": facts.handler.__name__,
        "parameters": _parameters(facts),
        "responses": responses,
    }
    if facts.body is not None:
        operation["requestBody"] = {"required": not facts.body_optional, **_json(_ref(facts.body.__name__))}
    if facts.form is not None:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": facts.form}}}
    return operation


def _events(facts: RouteFacts) -> dict[str, Any]:
    """A stream is text; each event of it has JSON as its data, and the last one `[DONE]`."""
    data: dict[str, Any] = {"type": "string"}
    if facts.chunk is not None:
        one_of = [_ref(facts.chunk.__name__), _ref(facts.error.__name__)]
        told = {"contentMediaType": "application/json", "contentSchema": {"anyOf": one_of}}
        data = {"type": "string", "anyOf": [{"const": "[DONE]"}, told]}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return {"itemSchema": event}


def _parameters(facts: RouteFacts) -> list[dict[str, Any]]:
    in_path = [part[1:-1] for part in shown(facts.path).split("/") if part.startswith("{")]
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in in_path
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": {"type": kind} if isinstance(kind, str) else kind}
        for name, kind in facts.query.items()
    ]
    if facts.idempotent:
        schema = {"type": "string", "minLength": 1, "maxLength": 255}
        parameters.append({"name": "Idempotency-Key", "in": "header", "required": False, "schema": schema})
    return parameters


def shown(path: str) -> str:
    """A route's path without Starlette's word for what may hold slashes."""
    return path.replace(":path}", "}")


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _content(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, **_json(schema)}
