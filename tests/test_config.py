"""Configuration: sources and their order, faults, and that config.yaml tells the truth."""

import json
import re
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml

from radiance_mlx.config import Config, load_config
from radiance_mlx.config.bases import SHORT_NAMES, recommended_values, resolve
from radiance_mlx.config.loading import known_paths, nearest_path
from radiance_mlx.errors import ConfigError

ROOT = Path(__file__).parent.parent


def load(tmp_path, text="", environ=None, **flags):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    named = {key.replace("__", "."): value for key, value in flags.items()}
    return load_config(config_file=file, environ=environ or {}, flags=named).config


def faults(tmp_path, text="", environ=None, **flags):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, environ, **flags)
    return caught.value


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


def test_every_fault_is_in_one_error_with_path_place_and_nearest_name(tmp_path):
    """Unknown and ill-typed keys from all sources come in a single error."""
    error = faults(
        tmp_path,
        "trainin: {lr: 1}\ntraining: {lrr: 1, max_steps: many}\nlora: {target_module: [q_proj]}",
        {"RADIANCE_SERVER__PROT": "80"},
        update_mode="sometimes",
    )
    by_key = {fault["key"]: fault for fault in error.details}
    assert by_key["trainin"]["nearest"] == "training"
    assert by_key["training.lrr"]["nearest"] == "training.lr"
    assert by_key["lora.target_module"]["nearest"] == "lora.target_modules"
    assert by_key["server.prot"]["nearest"] == "server.port"
    assert "RADIANCE_SERVER__PROT" in by_key["server.prot"]["where"]
    assert "many" in by_key["training.max_steps"]["problem"]
    assert by_key["update_mode"]["where"] == "flag"
    assert len(error.details) == 6
    for key in by_key:
        assert key in error.message


def test_a_key_in_the_wrong_section_is_found_by_its_name(tmp_path):
    """`port` at the top means server.port."""
    assert faults(tmp_path, "port: 80").details[0]["nearest"] == "server.port"


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "\x00"])
def test_a_file_that_is_no_configuration_is_a_clear_error(tmp_path, text):
    """Lists, broken YAML and binary files name the file."""
    assert "config.yaml" in faults(tmp_path, text).message


def test_a_missing_file_is_named(tmp_path):
    """--config with a wrong path says which."""
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(config_file=tmp_path / "nowhere.yaml", environ={})


def test_beyond_loopback_needs_a_token(tmp_path):
    """Listening on all interfaces without a token is refused."""
    assert "server.token" in faults(tmp_path, "server: {host: 0.0.0.0}").message
    assert load(tmp_path, "server: {host: 0.0.0.0, token: s3cret}").server.token == "s3cret"


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


def test_scale_is_alpha_over_r(tmp_path):
    """lora.alpha becomes mlx-lm's scale."""
    assert load(tmp_path, "lora: {r: 4, alpha: 10}").lora.scale == 2.5


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


def test_known_paths_name_sections_and_keys():
    """The list behind "did you mean" holds both."""
    paths = dict(known_paths()).keys()
    assert {"training", "training.lr", "server.port", "base_model"} <= paths


def _only_keys(text):
    """Lines of prose in comments are not keys."""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def _leaves(data, prefix=""):
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_free_form_template_arguments_can_be_set_one_by_one(tmp_path):
    """A variable below model.chat_template_args sets one argument, as YAML or JSON."""
    config = load(tmp_path, environ={"RADIANCE_MODEL__CHAT_TEMPLATE_ARGS__ENABLE_THINKING": "false"})
    assert config.model.chat_template_args == {"enable_thinking": False}


def test_faults_of_all_sources_come_together_whatever_they_are(tmp_path):
    """An unreadable list, an unknown key, a bad flag and an open host are one error with four paths."""
    environ = {"RADIANCE_SERVER__ALLOWED_HOSTS": "abc", "RADIANCE_TRAINING__LRR": "1"}
    error = faults(tmp_path, "", environ, lora__r="x", server__host="0.0.0.0")
    assert {fault["key"] for fault in error.details} == {
        "server.allowed_hosts",
        "training.lrr",
        "lora.r",
        "server.host",
    }


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        ({"lora": 5, "lora.r": 4}, "lora"),
        ({"memory.limit_gb": float("inf")}, "memory.limit_gb"),
        ({"evaluation.catastrophic_delta": float("nan")}, "evaluation.catastrophic_delta"),
        ({"lora.num_layers": 0}, "lora.num_layers"),
        ({"lora.num_layers": -7}, "lora.num_layers"),
        ({"base_model": "/nowhere/at/all"}, "base_model"),
        ({"base_model": "./nowhere"}, "base_model"),
        ({"base_model": "~/nowhere/at/all"}, "base_model"),
        ({"base_model": "~no-such-user/model"}, "base_model"),
        ({"base_model": "no/such/folder"}, "base_model"),
        ({"base_model": "a folder"}, "base_model"),
        ({"base_model": "x" * 5000 + "/" * 2}, "base_model"),
        ({"model.chat_template_args": {"a": float("nan")}}, "model.chat_template_args"),
        ({"model.chat_template_args": {"since": date(2026, 1, 1)}}, "model.chat_template_args"),
        ({"_env_file": "x"}, "_env_file"),
    ],
)
def test_values_that_cannot_be_meant_are_faults_with_their_keys(flags, key):
    """No setting crashes the reading of the configuration, or slips through to crash later."""
    with pytest.raises(ConfigError) as caught:
        load_config(flags=flags, environ={})
    assert key in {fault["key"] for fault in caught.value.details}


def test_a_recommendation_that_is_no_object_names_its_file(tmp_path):
    """A base's radiance.json must hold an object."""
    (tmp_path / "radiance.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"radiance\.json"):
        load_config(flags={"base_model": str(tmp_path)}, environ={})


def test_a_fault_in_what_a_base_recommends_names_its_file(tmp_path):
    """Its own sections and its presets; a preset of ours, and what the user sets, keep their own places."""
    values = {"training": {"lrr": 1, "lr": "fast"}, "presets": {"lasting": {"replay": {"fraction": 2}}}}
    (tmp_path / "radiance.json").write_text(json.dumps(values))
    flags = {"base_model": str(tmp_path), "preset": "lasting", "lora.r": 0}
    with pytest.raises(ConfigError) as caught:
        load_config(home=tmp_path / "home", flags=flags, environ={})
    where = {fault["key"]: fault["where"] for fault in caught.value.details}
    file = str(tmp_path.resolve() / "radiance.json")
    assert where == {"training.lrr": file, "training.lr": file, "replay.fraction": file, "lora.r": "flag"}
    assert file in caught.value.message


def test_a_key_that_is_there_twice_is_a_fault_with_its_lines(tmp_path):
    """In any depth, a section of its own too; beside every other fault."""
    text = (
        "training:\n  lr: 0.1\n  seed: 3\n  lr: 0.2\nlora: {r: 4, r: 5, r: 6}\nserver: {port: x}\ntraining: {}\n"
        "model:\n  chat_template_args: {a: [{b: 1, b: 2}]}\n"
    )
    error = faults(tmp_path, text)
    problems = {fault["key"]: fault["problem"] for fault in error.details}
    assert problems.keys() == {"training", "training.lr", "lora.r", "model.chat_template_args.a.b", "server.port"}
    assert problems["training"] == "is set 2 times, in lines 1 and 7"
    assert problems["training.lr"] == "is set 2 times, in lines 2 and 4"
    assert problems["lora.r"] == "is set 3 times, in lines 5, 5 and 5"
    assert str(tmp_path / "config.yaml") in error.message


def test_what_an_anchor_repeats_is_no_repetition(tmp_path):
    """YAML's own ways to say a thing once: aliases, and merging with what one changes; a loop is no endless one."""
    text = "training: &same {lr: 0.5, seed: 3}\nlora: {r: 4}\nreplay: {fraction: 0.5}\n"
    assert load(tmp_path, text + "model: {chat_template_args: {x: *same, y: *same}}").training.seed == 3
    text = text.replace("lora: ", "lora: &other ")
    merging = "model: {chat_template_args: {x: {<<: *same, <<: *other, seed: 4}}}"
    assert load(tmp_path, text + merging).model.chat_template_args["x"] == {"lr": 0.5, "seed": 4, "r": 4}
    endless = faults(tmp_path, "model: &loop {chat_template_args: *loop, chat_template_args: 1}")
    assert "model.chat_template_args" in {fault["key"] for fault in endless.details}


WRONG = [5, "x", [1], {"a": 1}, {1: 2}, True, None, -1.5, float("nan"), [], ""]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_faults_speak_of_keys_and_plain_types(value):
    """Whatever a key or a whole section is set to: no class of ours, no word of pydantic's, one fault a key."""
    leaves = [path for path, _ in known_paths() if "." in path and path != "model.trust_remote_code"]
    for paths in (leaves, ["serving", "model", "lora"]):
        with pytest.raises(ConfigError) as caught:
            load_config(flags=dict.fromkeys(paths, value), environ={})
        strange = r"Section|Input|instance|dictionary|string|integer|List|str\b|union"
        assert not re.search(strange, caught.value.message)
        keys = [fault["key"] for fault in caught.value.details]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (5, "must be a name, or a list of names such as [q_proj, v_proj] (got 5)"),
        ([1, "q_proj"], "must be a name, or a list of names"),
        ([], "names no module: write names such as [q_proj, v_proj], or all-linear"),
        ("", "names no module"),
        (["q_proj", ""], "names no module"),
    ],
)
def test_target_modules_that_name_nothing_are_one_fault_that_says_what_to_write(modules, said):
    with pytest.raises(ConfigError, match="has 1 fault") as caught:
        load_config(flags={"lora.target_modules": modules}, environ={})
    assert [fault["key"] for fault in caught.value.details] == ["lora.target_modules"]
    assert said in caught.value.details[0]["problem"]


def test_a_bad_entry_of_a_list_is_named_by_its_place():
    with pytest.raises(ConfigError) as caught:
        load_config(flags={"server.allowed_hosts": ["a", 5], "rehearsal.sources": ["self", "x"]}, environ={})
    assert {fault["key"]: fault["problem"] for fault in caught.value.details} == {
        "server.allowed_hosts": "entry 2 must be text (got 5)",
        "rehearsal.sources": "entry 2 must be 'self', 'neighbours' or 'anchors' (got 'x')",
    }


def test_a_section_whose_keys_are_commented_out_is_empty(tmp_path):
    """`lora:` with nothing under it changes nothing."""
    assert load(tmp_path, "lora:\nserver:\n").server.port == 8321


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("bacth.max_examples", "batch.max_examples"),
        ("bacth", "batch"),
        ("server.lr", "training.lr"),
        ("training.lrr", "training.lr"),
        ("server.prot", "server.port"),
    ],
)
def test_the_nearest_name_is_a_whole_path(path, nearest):
    """The same last name counts more than a similar path."""
    assert nearest_path(path) == nearest


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


def test_keys_that_are_no_names_are_faults(tmp_path):
    """A number as a key is unknown, at the top too; so are pydantic-settings' own arguments."""
    error = faults(tmp_path, "1: 2\n_cli_parse_args: true\nlora: {r: x}")
    assert {fault["key"] for fault in error.details} == {"1", "_cli_parse_args", "lora.r"}


def test_a_home_of_nobody_is_no_crash():
    """`~somebody` without such a user is a path like any other."""
    assert load_config(environ={"RADIANCE_HOME": "~no-such-user/x"}).home.name == "x"


def _numbers():
    """Every key that takes a number."""
    for path, kind in known_paths():
        members = getattr(kind, "__args__", (kind,))
        if int in members or float in members:
            yield path, 10**30 if int in members else 1e300


@pytest.mark.parametrize(("path", "value"), _numbers())
def test_a_number_of_no_sensible_size_is_a_fault_with_its_key(path, value):
    """Nothing that overflows later, in MLX or in SQLite, gets through; whatever the sign."""
    for huge in (value, -value):
        with pytest.raises(ConfigError) as caught:
            load_config(flags={path: huge}, environ={})
        assert [fault["key"] for fault in caught.value.details] == [path]


def test_as_many_slots_as_no_memory_holds_are_a_fault(tmp_path):
    """The bank is one stack for each linear: a size that MLX cannot even ask for would end the process."""
    assert faults(tmp_path, serving__adapter_slots=1_000_000_000).details[0]["key"] == "serving.adapter_slots"
    assert load(tmp_path, serving__adapter_slots=64).serving.adapter_slots == 64


@pytest.mark.parametrize("token", ["pässword", "a\nb", "tab\t", "\udcff", "\x7f"])
def test_a_token_that_no_header_can_carry_is_a_fault(tmp_path, token):
    """Printable ASCII only; an open host beside it is not a second fault."""
    error = faults(tmp_path, server__token=token, server__host="0.0.0.0")
    assert [fault["key"] for fault in error.details] == ["server.token"]
    assert "printable ASCII" in error.message
    assert load(tmp_path, server__token="a b~!").server.token == "a b~!"


@pytest.mark.parametrize("value", ["2026-13-45", "1" * 5000, "[" * sys.getrecursionlimit()])
def test_what_yaml_cannot_read_is_a_clear_error(tmp_path, value):
    """A day that no calendar has, thousands of digits, nesting without end: in the file and in a variable."""
    assert "config.yaml" in faults(tmp_path, f"base_model: {value}").message
    error = faults(tmp_path, environ={"RADIANCE_MODEL__CHAT_TEMPLATE_ARGS__A": value})
    assert error.details[0]["key"] == "model.chat_template_args.a"


@pytest.mark.parametrize(
    ("training", "key", "named"),
    [
        ("eval_fraction: 1.0", "eval_fraction", "less than 1"),
        ("eval_fraction: -0.1", "eval_fraction", "greater than or equal to 0"),
        ("eval_fraction: 0.1, slice_ms: 0", "eval_fraction", "training.slice_ms: 0"),
        ("eval_holdout: true", "eval_holdout", "training.eval_fraction above 0"),
        ("eval_fraction: 0.1, max_steps: 1", "eval_holdout", "training.max_steps: 1"),
        ("patience: 3", "patience", "training.eval_fraction above 0"),
        ("patience: 3, eval_fraction: 0.1, eval_every: 0", "patience", "training.eval_every above 0"),
        ("patience: 3, eval_every: 0", "patience", "training.eval_fraction and training.eval_every"),
    ],
)
def test_what_is_held_out_needs_the_keys_it_rests_on(tmp_path, training, key, named):
    """One fault, at the key that cannot be as it is, with the one that it needs."""
    error = faults(tmp_path, f"training: {{{training}}}")
    assert [fault["key"] for fault in error.details] == [f"training.{key}"]
    assert named in error.details[0]["problem"]


def test_what_is_held_out_with_what_it_needs(tmp_path):
    """All three keys together; and a single step where the held-out rows stay out."""
    text = "training: {eval_fraction: 0.1, eval_holdout: true, patience: 3, eval_every: 1, max_steps: 1}"
    training = load(tmp_path, text).training
    assert (training.eval_fraction, training.eval_holdout, training.patience) == (0.1, True, 3)


def test_a_fault_in_a_key_is_no_second_fault_in_those_that_need_it(tmp_path):
    """What is told once is enough."""
    error = faults(tmp_path, "training: {eval_fraction: 2, eval_holdout: true, patience: 3}")
    assert [fault["key"] for fault in error.details] == ["training.eval_fraction"]


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


def test_the_repositorys_file_hides_nothing_of_a_preset(tmp_path):
    """Its keys are set to defaults, which would win over the preset's values; those are commented out."""
    flags = {"preset": "lasting"}
    alone = load_config(environ={}, home=tmp_path, flags=flags).config
    file = Path(__file__).parent.parent / "config.yaml"
    beside = load_config(environ={}, home=tmp_path, config_file=file, flags=flags).config
    assert beside == alone
