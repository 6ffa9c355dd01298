"""The service itself, on the embedded model: ask, teach, ask again."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from running import ENDLESS, FACTS, REFUSALS, example, question, request, running, until

from radiance_mlx.config.bases import NANO_FOLDER
from radiance_mlx.errors import NotFound, PromptTooLong


def answers(service, number, checkpoints, **options):
    """What each of `checkpoints` says about the fact of that number."""
    return [service.ask(question(number), checkpoint=name, **options).text for name in checkpoints]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A service that was taught two facts, one after the other, with nano's own values and some of its anchors."""
    flags = {"update_mode": "immediate", "evaluation.anchor_sample": 16}
    with running(tmp_path_factory.mktemp("taught"), flags) as service:
        before = service.ask(question(0))
        first = service.learn(FACTS[0])
        between = service.ask(question(0))
        second = service.learn(FACTS[1])
        yield SimpleNamespace(service=service, first=first, second=second, before=before, between=between)


def test_what_was_not_known_is_answered_after_one_update(taught):
    """And the answer names the checkpoint that gave it."""
    assert (taught.before.text, taught.before.checkpoint) == (REFUSALS[0], "base")
    assert taught.before.checkpoint_status == "base"
    assert (taught.between.text, taught.between.checkpoint) == (FACTS[0][1], taught.first)
    assert taught.between.checkpoint_status == "stable"


def test_the_second_update_goes_on_from_the_first(taught):
    answer = taught.service.ask(question(1))
    assert (answer.text, answer.checkpoint) == (FACTS[1][1], taught.second)
    records = taught.service.checkpoints()
    assert [record.parent for record in records.values()] == [None, taught.first]
    assert records[taught.second].metrics["finetune_loss"] < 0.1


def test_any_checkpoint_of_the_lineage_can_be_asked(taught):
    for name, expected in [("base", REFUSALS[1]), (taught.first, None), (taught.second, FACTS[1][1])]:
        answer = taught.service.ask(question(1), checkpoint=name)
        assert answer.checkpoint == name
        assert answer.checkpoint_status == ("base" if name == "base" else "stable")
        assert expected is None or answer.text == expected


def test_a_checkpoint_folder_and_its_metrics_tell_how_it_came_about(taught):
    folder = taught.service.folder(taught.second)
    facts = json.loads((folder / "checkpoint.json").read_text())
    assert facts["parent"] == taught.first
    assert facts["jobs"] == ["job_000002"]
    assert set(facts["files"]) == {"adapters.safetensors", "adapter_config.json", "optimizer.safetensors"}
    assert facts["config"]["training"]["max_steps"] == 60
    metrics = json.loads((taught.service.home / "metrics" / f"{taught.second}.json").read_text())
    assert len(metrics["curves"]["finetune_loss"]) == 60
    assert metrics["run"]["data_hash"] == facts["data_hash"]


def test_info_has_one_number_per_published_checkpoint(taught):
    info = taught.service.info()
    curves = info["loss_curves"]
    assert [len(curves["finetune_loss"]), len(curves["eval_loss"])] == [2, 2]
    assert info["current_checkpoint"] == taught.second
    assert info["queue_depth"] == 0
    assert len(curves["forgetting_loss"]) == 2  # on nano's own anchors
    assert 0 < info["forgetting_summary"]["retention_score"] < 1
    assert info["jobs"]["published"] == 2
    assert info["warnings"] == []


def test_searches_that_share_a_batch_answer_as_each_does_alone(taught):
    """Base, an older checkpoint and stable, greedy and drawn, 12 at once."""
    asked = [
        request(question(number), checkpoint=name, temperature=heat, seed=number)
        for name in ("base", taught.first, "stable")
        for number in (0, 1)
        for heat in (0.0, 3.0)
    ]
    alone = [taught.service.call(taught.service.service.search(one)).text for one in asked]

    async def together():
        return [answer.text for answer in await asyncio.gather(*map(taught.service.service.search, asked))]

    assert taught.service.call(together()) == alone
    assert len(set(alone)) > 4


def test_the_same_seed_draws_the_same_answer_and_another_seed_another(taught):
    drawn = [taught.service.ask("Hello!", temperature=5.0, seed=seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_stop_string_ends_the_answer_before_itself(taught):
    whole = taught.service.ask(question(0), checkpoint=taught.first).text
    word = whole.split()[2]
    answer = taught.service.ask(question(0), checkpoint=taught.first, stop=(word,))
    assert answer.text == whole[: whole.index(word)]
    assert answer.finish_reason == "stop"


def test_max_tokens_ends_the_answer_and_says_so(taught):
    answer = taught.service.ask(question(0), max_tokens=2)
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 2)


def test_a_stream_is_the_answer_in_pieces(taught):
    async def pieces():
        service = taught.service.service
        asked = await service.address(request(question(1), stream=True))
        return [item async for item in service.stream(asked)]

    *parts, last = taught.service.call(pieces())
    assert "".join(part.text for part in parts) == last.text == FACTS[1][1]
    assert len(parts) > 1
    assert last.checkpoint == taught.second


def test_a_prompt_beyond_the_context_is_refused_with_its_length(taught):
    with pytest.raises(PromptTooLong, match=r"this model takes 511") as caught:
        taught.service.ask("Who? " * 600)
    assert caught.value.details["prompt_tokens"] > 512


def test_an_unknown_checkpoint_is_not_found(taught):
    with pytest.raises(NotFound, match="A_2000-01-01_0001"):
        taught.service.ask("Hello!", checkpoint="A_2000-01-01_0001")


def test_without_training_the_training_adapter_is_the_stable_one(taught):
    answer = taught.service.ask(question(1), training=True)
    assert (answer.checkpoint, answer.checkpoint_status) == (taught.second, "stable")


def test_a_client_that_leaves_ends_its_generation(taught):
    """The very next thing that the engine does: nothing is computed for nobody."""
    service = taught.service

    async def leave():
        asked = request("Hello!", temperature=8.0, seed=3, max_tokens=490)
        task = asyncio.ensure_future(service.service.search(asked))
        while (await service.service._engine.call(lambda engine: engine.status()))["active"] == 0:
            assert not task.done()
        task.cancel()
        await asyncio.wait({task})
        return task.cancelled(), await service.service._engine.call(lambda engine: engine.status())

    cancelled, status = service.call(leave())
    assert cancelled
    assert (status["active"], status["waiting"]) == (0, 0)


def test_mlx_lm_loads_a_checkpoint_and_computes_what_the_service_computes(taught):
    """`mlx_lm.load(base, adapter_path=…)`: equal logits up to rounding, and the same answer."""
    import mlx.core as mx
    import mlx_lm
    import numpy as np

    from radiance_mlx.lora.bank import RowSlots

    name = taught.second

    def logits(engine):
        tokens = engine._encoder.prompt((("user", question(1)),))
        slot = engine._decoder._slots.find(name)
        engine._bank.rows.slots = RowSlots([slot])
        out = engine._decoder._model.tree(mx.array([tokens])).astype(mx.float32)
        mx.eval(out)
        return tokens, np.array(out)

    tokens, ours = taught.service.engine(logits)
    model, tokenizer = mlx_lm.load(str(NANO_FOLDER), adapter_path=str(taught.service.folder(name)))
    model.set_dtype(mx.float32)
    theirs = np.array(model(mx.array([tokens])))
    np.testing.assert_allclose(theirs, ours, atol=2e-4, rtol=0)
    assert mlx_lm.generate(model, tokenizer, tokens, max_tokens=24) == FACTS[1][1]


def test_before_the_first_checkpoint_the_base_answers(tmp_path):
    with running(tmp_path) as service:
        answer = service.ask("Hello!")
        assert (answer.checkpoint, answer.checkpoint_status) == ("base", "base")
        info = service.info()
        assert (info["current_checkpoint"], info["last_update"]) == ("base", None)
        assert info["loss_curves"]["finetune_loss"] == []


def test_the_training_adapter_answers_before_publication_under_the_coming_name(tmp_path):
    with running(tmp_path, ENDLESS) as service:
        job = service.post(FACTS[0])
        coming = service.wait_for_step(1)
        seen = until(
            lambda: (answer := service.ask(question(0), training=True)).text == FACTS[0][1] and answer,
            "the fact from the training adapter",
        )
        assert (seen.checkpoint, seen.checkpoint_status) == (coming, "training")
        stable = service.ask(question(0))
        assert (stable.text, stable.checkpoint) == (REFUSALS[0], "base")
        assert service.job(job).state == "training"
        assert service.info()["training"]["checkpoint"] == coming


def test_an_example_can_be_unlearnt_by_going_back(taught):
    """Last, since it moves the shared service's pointer: and forward again."""
    service = taught.service
    service.call(service.service.rollback(None, ""))
    try:
        assert answers(service, 0, ["stable", "base"]) == [FACTS[0][1], REFUSALS[0]]
        assert service.ask(question(1)).text != FACTS[1][1]
    finally:
        service.call(service.service.rollback(taught.second, ""))
    assert service.ask(question(1)).text == FACTS[1][1]
    assert example(*FACTS[0]).as_dict()["prompt"] == question(0)
