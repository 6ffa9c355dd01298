"""From a request's model and options to questions, and from questions to answers: all of one request together."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from starlette.requests import Request

from ...errors import NotFound, NotReady, RadianceError
from ...messages import BASE, STABLE, Answer, Generate, Sampling, TextDelta
from ...service import Service
from ..routing import unless_client_leaves
from .errors import BadParameter, ModelNotFound

TRAINING = "training"  # the model id of the live weights
Numbered = tuple[int, TextDelta | Answer]


async def addressed(service: Service, model: str, sampling: Sampling) -> Generate:
    """A question without its messages, to what `model` names. Raises `ModelNotFound`, `BadParameter`, `NotReady`."""
    facts = service.facts
    if facts is None:
        raise NotReady("The model is still loading.", "Try again in a moment.")
    unknown = [token for token, _ in sampling.logit_bias if token >= facts.vocab_size]
    if unknown:
        raise BadParameter(
            "logit_bias", f"'logit_bias' names the token {unknown[0]}; this model's are 0 to {facts.vocab_size - 1}."
        )
    return Generate(
        messages=(),
        checkpoint=await checkpoint_of(service, model),
        sampling=sampling,
        training=model == TRAINING,
    )


async def checkpoint_of(service: Service, model: str) -> str:
    """The checkpoint, "base" or "stable" that `model` stands for. Raises `ModelNotFound`."""
    if model in (STABLE, TRAINING, service.config.base_model):
        return STABLE
    if model == BASE:
        return BASE
    if ":" in model and (named := (await service.tuning.names()).get(model)) is not None:
        return named
    try:
        return (await service.checkpoint(model)).checkpoint
    except NotFound:
        raise ModelNotFound(f"There is no model '{model}'.", "GET /v1/models lists them.") from None


async def several(service: Service, questions: Sequence[Generate], n: int) -> list[Generate]:
    """Each question `n` times, each time with a seed of its own; all of them go to one checkpoint.

    Raises `BadParameter` for more than may ever wait at once.
    """
    count, most = n * len(questions), service.config.serving.max_waiting
    if count > most:
        raise BadParameter(
            "n", f"This asks for {count} answers, prompts times 'n'; {most} may wait at once.", "Ask for fewer."
        )
    if n == 1 and len(questions) == 1:
        return list(questions)
    return [
        replace(pinned, sampling=replace(pinned.sampling, seed=derived_seed(pinned.sampling.seed, number)))
        for question in questions
        for pinned in [replace(question, checkpoint=(await service.address(question)).checkpoint)]
        for number in range(n)
    ]


def derived_seed(seed: int | None, number: int) -> int | None:
    """The first choice has the seed itself, as if it were the only one."""
    if seed is None or number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:7], "big")


async def answers_to(request: Request, service: Service, questions: Sequence[Generate]) -> list[Answer]:
    """All answers, in the order of the questions; one that fails, or a client that leaves, ends them all."""
    return await unless_client_leaves(request, _together(service, questions))


async def _together(service: Service, questions: Sequence[Generate]) -> list[Answer]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(service.search(question)) for question in questions]
    except BaseExceptionGroup as failed:
        raise _first(failed) from None
    return [task.result() for task in tasks]


def _first(failed: BaseExceptionGroup) -> BaseException:
    """What is told of several faults."""
    told: BaseException = failed.subgroup(RadianceError) or failed
    while isinstance(told, BaseExceptionGroup):
        told = told.exceptions[0]
    return told


async def pieces_of(service: Service, questions: Sequence[Generate]) -> AsyncIterator[Numbered]:
    """(the question's number, a piece or its answer) as they come. Leaving the iterator ends what still goes on."""
    coming: asyncio.Queue[Numbered | BaseException] = asyncio.Queue()

    async def follow(number: int, question: Generate) -> None:
        try:
            async with contextlib.aclosing(service.stream(question)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    coming.put_nowait((number, piece))
        except Exception as error:
            coming.put_nowait(error)

    asked = [replace(question, stream=True) for question in questions]
    tasks = [asyncio.create_task(follow(number, question)) for number, question in enumerate(asked)]
    left = len(tasks)
    try:
        while left:
            item = await coming.get()
            if isinstance(item, BaseException):
                raise item
            left -= isinstance(item[1], Answer)
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
