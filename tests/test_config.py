"""Configuration: sources and their order, and that config.yaml tells the truth."""

import json
import re
from pathlib import Path

import pytest
import yaml
from configs import faults, load

from radiance_mlx.config import Config, load_config
from radiance_mlx.config.bases import SHORT_NAMES, recommended_values, resolve
from radiance_mlx.errors import ConfigError

ROOT = Path(__file__).parent.parent


# --- sources -------------------------------------------------------------------------------------


def test_the_specifications_keys_have_its_defaults():
    """All keys of the specification exist with its values, but for those that the platform makes impossible."""
    config = Config()
    assert config.backend == "auto"
    assert config.base_model == "nano"
    assert config.update_mode == "batched"
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (8, 16, 0.05)
    assert config.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    training = config.training
    assert (training.batch_size, training.grad_accum, training.lr) == (1, 16, 1e-4)
    assert (training.max_steps, training.eval_every) == (200, 1)
    assert (config.batch.max_examples, config.batch.max_age_minutes) == (128, 30)
    evaluation = config.evaluation
    assert evaluation.anchor_dataset == "tnn1t1s/news-100-sept-2023"
    assert (evaluation.anchor_split, evaluation.anchor_sample) == ("train", 1000)
    assert (evaluation.rollback_mode, evaluation.catastrophic_delta) == ("off", 0.25)


def test_the_specifications_own_file_is_accepted(tmp_path):
    """The draft of the specification loads as it stands, `mps`, bare `off` and `1e-4` included."""
    config = load(
        tmp_path,
        """
backend: mps
base_model: mistral-7b-instruct
update_mode: batched
lora: {r: 8, alpha: 16, dropout: 0.05, target_modules: [q_proj, k_proj, v_proj, o_proj]}
training: {batch_size: 1, grad_accum: 16, lr: 1e-4, max_steps: 200, eval_every: 1}
batch: {max_examples: 128, max_age_minutes: 30}
evaluation:
  anchor_provider: hf
  anchor_dataset: tnn1t1s/news-100-sept-2023
  anchor_split: train
  anchor_sample: 1000
  rollback_mode: off
  catastrophic_delta: 0.25
""",
    )
    assert config.training.lr == 1e-4
    assert config.evaluation.rollback_mode == "off"
    assert config.evaluation.anchor_provider == "hf"


def test_a_flag_wins_over_environment_over_file_over_base_over_default(tmp_path):
    """Each source hides the ones below it, key by key."""
    text = "training: {lr: 0.01, max_steps: 7, batch_size: 3}\nserver: {port: 1111}"
    environ = {"RADIANCE_TRAINING__LR": "0.02", "RADIANCE_TRAINING__BATCH_SIZE": "5"}
    config = load(tmp_path, text, environ, training__lr=0.03)
    assert config.training.lr == 0.03  # flag
    assert config.training.batch_size == 5  # environment
    assert config.training.max_steps == 7  # file
    assert config.training.grad_accum == 1  # nano's own
    assert config.training.seed == 0  # default


def test_environment_takes_lists_as_json(tmp_path):
    """A list in a variable is JSON."""
    config = load(tmp_path, environ={"RADIANCE_LORA__TARGET_MODULES": '["q_proj"]'})
    assert config.lora.target_modules == ["q_proj"]


def test_trust_remote_code_is_for_the_file_only(tmp_path):
    """Neither a variable nor a flag turns on code that comes with a model."""
    assert load(tmp_path, "model: {trust_remote_code: true}").model.trust_remote_code
    assert "file" in faults(tmp_path, environ={"RADIANCE_MODEL__TRUST_REMOTE_CODE": "true"}).message
    assert "file" in faults(tmp_path, model__trust_remote_code=True).message


def test_chat_template_args_come_from_file_and_environment(tmp_path):
    """`enable_thinking` and the like are free-form."""
    assert load(tmp_path, "model: {chat_template_args: {enable_thinking: false}}").model.chat_template_args == {
        "enable_thinking": False
    }
    environ = {"RADIANCE_MODEL__CHAT_TEMPLATE_ARGS": '{"enable_thinking": false}'}
    assert load(tmp_path, "", environ).model.chat_template_args == {"enable_thinking": False}


def test_free_form_template_arguments_can_be_set_one_by_one(tmp_path):
    """A variable below model.chat_template_args sets one argument, as YAML or JSON."""
    config = load(tmp_path, environ={"RADIANCE_MODEL__CHAT_TEMPLATE_ARGS__ENABLE_THINKING": "false"})
    assert config.model.chat_template_args == {"enable_thinking": False}


def test_only_keys_that_take_a_list_or_an_object_are_read_as_yaml(tmp_path):
    """A token is text, whatever it looks like; lists and objects may be in any of YAML's forms."""
    for token in ("0123", "[ab", "{x}", "null"):
        assert load(tmp_path, environ={"RADIANCE_SERVER__TOKEN": token}).server.token == token
    environ = {
        "RADIANCE_SERVER__ALLOWED_HOSTS": "- a.local\n- b.local",
        "RADIANCE_MODEL__CHAT_TEMPLATE_ARGS": "enable_thinking: false",
        "RADIANCE_LORA": "{r: 5}",
        "RADIANCE_LORA__TARGET_MODULES": "all-linear",
    }
    config = load(tmp_path, environ=environ)
    assert config.server.allowed_hosts == ["a.local", "b.local"]
    assert config.model.chat_template_args == {"enable_thinking": False}
    assert (config.lora.r, config.lora.targets) == (5, ["all-linear"])
    broken = faults(tmp_path, environ={"RADIANCE_SERVER__ALLOWED_HOSTS": "[a", "RADIANCE_TRAINING__LR": "x"})
    assert {fault["key"] for fault in broken.details} == {"server.allowed_hosts", "training.lr"}


def test_a_section_whose_keys_are_commented_out_is_empty(tmp_path):
    """`lora:` with nothing under it changes nothing."""
    assert load(tmp_path, "lora:\nserver:\n").server.port == 8321


def test_what_an_anchor_repeats_is_no_repetition(tmp_path):
    """YAML's own ways to say a thing once: aliases, and merging with what one changes; a loop is no endless one."""
    text = "training: &same {lr: 0.5, seed: 3}\nlora: {r: 4}\nreplay: {fraction: 0.5}\n"
    assert load(tmp_path, text + "model: {chat_template_args: {x: *same, y: *same}}").training.seed == 3
    text = text.replace("lora: ", "lora: &other ")
    merging = "model: {chat_template_args: {x: {<<: *same, <<: *other, seed: 4}}}"
    assert load(tmp_path, text + merging).model.chat_template_args["x"] == {"lr": 0.5, "seed": 4, "r": 4}
    endless = faults(tmp_path, "model: &loop {chat_template_args: *loop, chat_template_args: 1}")
    assert "model.chat_template_args" in {fault["key"] for fault in endless.details}


def test_which_file_and_which_home(tmp_path, monkeypatch):
    """--config, else the home's file when a home is given, else the one here; its folder is the home."""
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    monkeypatch.chdir(here)
    (here / "config.yaml").write_text("server: {port: 1}")
    loaded = load_config(environ={})
    assert (loaded.config.server.port, loaded.home) == (1, here)
    loaded = load_config(home=home, environ={})
    assert (loaded.config.server.port, loaded.home, loaded.file) == (8321, home, None)
    (home / "config.yaml").write_text("server: {port: 2}")
    assert load_config(home=home, environ={}).config.server.port == 2
    assert load_config(config_file=here / "config.yaml", home=home, environ={}).home == home
    (here / "config.yaml").unlink()
    assert load_config(environ={}).home.name == "radiance_mlx"


def test_a_home_of_nobody_is_no_crash():
    """`~somebody` without such a user is a path like any other."""
    assert load_config(environ={"RADIANCE_HOME": "~no-such-user/x"}).home.name == "x"


def test_scale_is_alpha_over_r(tmp_path):
    """lora.alpha becomes mlx-lm's scale."""
    assert load(tmp_path, "lora: {r: 4, alpha: 10}").lora.scale == 2.5


def test_what_is_held_out_with_what_it_needs(tmp_path):
    """All three keys together; and a single step where the held-out rows stay out."""
    text = "training: {eval_fraction: 0.1, eval_holdout: true, patience: 3, eval_every: 1, max_steps: 1}"
    training = load(tmp_path, text).training
    assert (training.eval_fraction, training.eval_holdout, training.patience) == (0.1, True, 3)


# --- bases ---------------------------------------------------------------------------------------


def test_names_of_bases(tmp_path):
    """nano, a folder, a short name, anything else is a hub name."""
    assert (resolve("nano") / "config.json").is_file()
    assert resolve(str(tmp_path)) == tmp_path.resolve()
    assert resolve("mistral-7b-instruct") == SHORT_NAMES["mistral-7b-instruct"]
    assert resolve("someone/some-model") == "someone/some-model"


def test_a_file_is_no_base(tmp_path, monkeypatch):
    """Nor is it looked up on the hub, though its name could be one there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="a file, not a folder"):
        resolve("model.safetensors")


def test_a_base_without_recommendations_gets_the_defaults(tmp_path):
    """Only nano's folder has a radiance.json; any other base keeps the specification's training values."""
    config = load(tmp_path, f"base_model: {tmp_path}")
    assert (config.training.lr, config.training.max_steps) == (1e-4, 200)
    assert recommended_values("nano")["training"]["lr"] == 5e-4


def test_a_folder_recommends_for_itself(tmp_path):
    """radiance.json in a model's folder lies under what the user sets; sections it may not set are left out."""
    (tmp_path / "radiance.json").write_text('{"training": {"lr": 0.5, "seed": 9}, "server": {"port": 1}}')
    config = load(tmp_path, f"base_model: {tmp_path}\ntraining: {{seed: 3}}")
    assert (config.training.lr, config.training.seed) == (0.5, 3)
    assert config.server.port == 8321


def test_a_base_can_recommend_nothing_but_how_it_is_taught(tmp_path):
    """A model folder is somebody else's: no code, no open port, no hub comes in by its `radiance.json`."""
    lasting = {
        "training": {"lr": 0.5},
        "replay": {"fraction": 0.25},
        "evaluation": {"metric": "finetune_loss", "anchor_provider": "hf"},
        "model": {"trust_remote_code": True},
        "server": {"allowed_origins": ["http://evil.example"]},
        "rehearsal": [1],
    }
    (tmp_path / "radiance.json").write_text(json.dumps({"presets": {"lasting": lasting, "none": 3}}))
    flags = {"base_model": str(tmp_path), "preset": "lasting"}
    config = load_config(home=tmp_path / "home", flags=flags, environ={}).config
    assert (config.training.lr, config.replay.fraction, config.evaluation.metric) == (0.5, 0.25, "finetune_loss")
    assert config.evaluation.anchor_provider is None
    assert not config.model.trust_remote_code
    assert config.server.allowed_origins == []


# --- the repository's file -----------------------------------------------------------------------


def _only_keys(text):
    """Lines of prose in comments are not keys."""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def _leaves(data, prefix=""):
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_config_yaml_explains_every_key_once_with_its_default():
    """The repository's file holds each key of the schema exactly once, with the default as value."""
    text = (ROOT / "config.yaml").read_text()
    uncommented = "\n".join(re.sub(r"^(\s*)# ?(\s*[a-z_]+:)", r"\1\2", line) for line in text.splitlines())
    data = yaml.safe_load(_only_keys(uncommented))
    defaults = Config().model_dump(mode="json")
    shown = dict(_leaves(data))
    expected = dict(_leaves(defaults))
    assert shown.keys() == expected.keys()
    for path, value in expected.items():
        got = "off" if shown[path] is False and value == "off" else shown[path]
        assert got == value or float(got) == value, path


def test_config_yaml_says_what_a_key_does_not_do_alone():
    """An open host needs allowed_hosts as well."""
    text = (ROOT / "config.yaml").read_text()
    host = text[text.index("  host:") : text.index("  port:")]
    assert "token" in host
    assert "allowed_hosts, e.g. [mini.local]" in host


def test_the_repositorys_config_yaml_loads():
    """A user who starts in the clone gets a valid configuration, with nano's own training values."""
    config = load_config(config_file=ROOT / "config.yaml", environ={}).config
    assert config.training.lr == 5e-4


def test_the_repositorys_file_hides_nothing_of_a_preset(tmp_path):
    """Its keys are set to defaults, which would win over the preset's values; those are commented out."""
    flags = {"preset": "lasting"}
    alone = load_config(environ={}, home=tmp_path, flags=flags).config
    file = Path(__file__).parent.parent / "config.yaml"
    beside = load_config(environ={}, home=tmp_path, config_file=file, flags=flags).config
    assert beside == alone
