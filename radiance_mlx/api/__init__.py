"""HTTP over the service: Starlette routes, pydantic bodies, server-sent events."""
