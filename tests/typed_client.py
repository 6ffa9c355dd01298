"""A program that uses the client as documented. Nobody runs it: `scripts/check` has mypy read it in strict mode."""

from typing import assert_type

from radiance_mlx import AsyncClient, Client, RadianceError, Retry
from radiance_mlx.client import Checkpoint, Info, Job, SearchResult, UpdateResult


def ask_and_teach() -> None:
    with Client("http://127.0.0.1:8321", api_key="secret", timeout=30, retry=Retry(attempts=3)) as client:
        assert_type(client.search("Hi?", temperature=0), SearchResult)
        accepted = client.update([{"input": "Hi?", "output": "Yes."}], tags=["a"], wait=True)
        assert_type(accepted, UpdateResult)
        assert_type(accepted.job, Job | None)
        with client.search_stream([{"role": "user", "content": "Hi?"}]) as stream:
            assert_type("".join(stream), str)
            assert_type(stream.result.usage.completion_tokens, int)
        assert_type(client.info(), Info)
        assert_type([job.state for job in client.jobs(limit=3)], list[str])
        assert_type(client.checkpoints().checkpoints, tuple[Checkpoint, ...])
        try:
            client.rollback("base")
        except RadianceError as error:
            assert_type((error.status, error.code, error.message, error.hint), tuple[int, str, str, str])


async def the_same() -> None:
    async with AsyncClient() as client:
        assert_type(await client.search("Hi?"), SearchResult)
        assert_type(await client.update([{"text": "a"}], wait=5.0), UpdateResult)
        async with client.search_stream("Hi?") as stream:
            async for piece in stream:
                assert_type(piece, str)
        assert_type(await client.wait("job_000001"), Job)
