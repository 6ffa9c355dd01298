"""OpenAI's API over the service: the calls, shapes, errors and streams that its clients know."""
