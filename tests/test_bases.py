"""Bases other than nano as it ships: quantised, without a chat template, reasoning, not batchable, not there."""

import json
import shutil
from pathlib import Path

import httpx
import pytest
from huggingface_hub import errors as hub
from running import FACTS, QUICK, REFUSALS, running

from radiance_mlx.config import Config
from radiance_mlx.config.bases import NANO_FOLDER
from radiance_mlx.engine import model
from radiance_mlx.errors import ConfigError, ModelError

LEARN = {
    "update_mode": "immediate",
    **{
        f"training.{k}": v
        for k, v in {"lr": 1e-3, "max_steps": 40, "batch_size": 4, "grad_accum": 1, "eval_every": 0}.items()
    },
    "lora.target_modules": ["all-linear"],
    "lora.dropout": 0.0,
    "evaluation.anchor_provider": "none",  # the copied folder brings anchors; they are not the point here
}


@pytest.fixture
def folder(tmp_path):
    """A copy of nano's folder, to be changed; without its recommended values."""
    copied = tmp_path / "base"
    shutil.copytree(NANO_FOLDER, copied, ignore=shutil.ignore_patterns("*.py", "__pycache__", "radiance.json"))
    return copied


def edit(file: Path, **values):
    """Set keys of a JSON file; None removes one."""
    document = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def quantise(folder: Path) -> None:
    from mlx_lm.utils import load, quantize_model, save_model

    model, _, config = load(str(folder), return_config=True)
    model, config = quantize_model(model, config, group_size=32, bits=8)
    (folder / "model.safetensors").unlink()
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_quantised_base_is_asked_taught_and_asked_again(tmp_path, folder):
    """A quantised folder loads through mlx-lm; its adapter is learnt and served like any other."""
    quantise(folder)
    with running(tmp_path / "home", {**LEARN, "base_model": str(folder), "training.stop_loss": 0.02}) as service:
        assert service.ask(FACTS[0][0]).text == REFUSALS[0]
        checkpoint = service.learn(FACTS[0], FACTS[1])
        answer = service.ask(FACTS[0][0])
        assert (answer.text, answer.checkpoint) == (FACTS[0][1], checkpoint)
        from mlx_lm import generate, load

        model, tokenizer = load(str(folder), adapter_path=str(service.folder(checkpoint)))
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": FACTS[0][0]}], add_generation_prompt=True)
        assert generate(model, tokenizer, prompt, max_tokens=24) == FACTS[0][1]


def test_a_base_without_a_chat_template_gets_plain_prompt_and_answer(tmp_path, folder):
    """What is taught as prompt and completion is answered to the bare prompt, and ends."""
    edit(folder / "tokenizer_config.json", chat_template=None)
    with running(tmp_path / "home", {**LEARN, "base_model": str(folder)}) as service:
        assert service.service.facts.chat_template is False
        service.learn(("The sum of all:", " forty two."))
        answer = service.ask("The sum of all:")
        assert (answer.text, answer.finish_reason) == ("forty two.", "stop")


def test_template_arguments_reach_the_template_and_reasoning_comes_apart(tmp_path, folder):
    """`enable_thinking` steers the template; what stands between the markers is `reasoning`, not the answer."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    edit(folder / "tokenizer_config.json", chat_template=template)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"] += [
        {
            "id": first + i,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
        for i, word in enumerate(("<think>", "</think>"))
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    enlarge(folder, first + 2)
    flags = {**LEARN, "base_model": str(folder)}
    with running(tmp_path / "home", flags) as service:
        service.learn(("Say so.", "<think>let me see</think>\n\nSo."))
        answer = service.ask("Say so.")
        assert (answer.reasoning, answer.text) == ("let me see", "So.")
        long = answer.prompt_tokens
    flags["model.chat_template_args"] = {"enable_thinking": False}
    with running(tmp_path / "other", flags) as service:
        assert service.ask("Say so.").prompt_tokens == long + 2


def enlarge(folder: Path, vocab: int) -> None:
    """Rows for new tokens in the embedding."""
    import mlx.core as mx

    weights = mx.load(str(folder / "model.safetensors"))
    old = weights["model.embed_tokens.weight"]
    fresh = mx.random.normal((vocab - old.shape[0], old.shape[1]), key=mx.random.key(0)) * 0.02
    weights["model.embed_tokens.weight"] = mx.concatenate([old, fresh])
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    edit(folder / "config.json", vocab_size=vocab)


def test_gemma2_is_answered_one_row_at_a_time_and_says_so(tmp_path, folder):
    """A model that mlx-lm cannot decode in batches: concurrent requests are all answered, with a warning."""
    import mlx.core as mx
    from architectures import GEMMA2
    from mlx.utils import tree_flatten
    from mlx_lm.models import gemma2

    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = {**GEMMA2, "vocab_size": vocab, "eos_token_id": 2}
    mx.random.seed(0)
    model = gemma2.Model(gemma2.ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    with running(tmp_path / "home", {**QUICK, "base_model": str(folder)}) as service:
        assert any("one by one" in warning for warning in service.info()["warnings"])
        questions = [q for q, _ in FACTS[:3]]
        alone = [service.ask(q, max_tokens=6).text for q in questions]

        async def together():
            import asyncio

            from running import request

            return await asyncio.gather(*[service.service.search(request(q, max_tokens=6)) for q in questions])

        assert [answer.text for answer in service.call(together())] == alone
        service.learn(FACTS[0])
        assert service.ask(questions[0], max_tokens=6).checkpoint == service.current


def test_a_folder_that_is_no_model_is_named(tmp_path):
    """The error says which folder, and what it lacks."""
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(ConfigError, match=r"empty.*config\.json"),
        running(tmp_path / "home", {**QUICK, "base_model": str(tmp_path / "empty")}),
    ):
        pass


@pytest.mark.parametrize(
    ("fault", "key"),
    [
        (hub.RepositoryNotFoundError, "base_model"),
        (hub.RevisionNotFoundError, "model.revision"),
        (hub.HFValidationError, "base_model"),
        (hub.GatedRepoError, None),
        (hub.LocalEntryNotFoundError, None),
    ],
)
def test_a_name_that_the_hub_does_not_know_is_a_fault_of_the_configuration(monkeypatch, fault, key):
    """A network that is down, or a licence that was not accepted, is none."""

    def refused(*_, **__):
        answer = (
            {"response": httpx.Response(404, request=httpx.Request("GET", "http://hub"))}
            if issubclass(fault, hub.HfHubHTTPError)
            else {}
        )
        raise fault("no such thing", **answer)

    monkeypatch.setattr(model, "mlx_lm_load", refused)
    config = Config(base_model="some/name", model={"revision": "v9"})
    with pytest.raises(ConfigError if key else ModelError, match="some/name") as caught:
        model.load_base(config, cpu=True)
    if key:
        assert [found["key"] for found in caught.value.details] == [key]


def test_modules_that_the_base_lacks_are_refused_with_what_it_has(tmp_path):
    """A wrong target name keeps the service from starting, and lists the right ones."""
    with (
        pytest.raises(ConfigError, match="q_proj"),
        running(tmp_path / "home", {**QUICK, "lora.target_modules": ["c_attn"]}),
    ):
        pass


def test_a_backend_that_the_machine_lacks_is_refused(tmp_path):
    """`backend: cuda` without CUDA is a clear error."""
    import mlx.core as mx

    if mx.metal.is_available():
        pytest.skip("this machine has Metal; CUDA wheels do not exist for it")
    with pytest.raises(ConfigError, match="metal"), running(tmp_path / "home", {**QUICK, "backend": "mps"}):
        pass
