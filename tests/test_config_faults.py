"""Faults of a configuration: all of them at once, each with its key, its place and what was meant."""

import json
import re
import sys
from datetime import date

import pytest
from configs import faults, load

from radiance_mlx.config import load_config
from radiance_mlx.config.loading import known_paths, nearest_path
from radiance_mlx.errors import ConfigError


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


def test_known_paths_name_sections_and_keys():
    """The list behind "did you mean" holds both."""
    paths = dict(known_paths()).keys()
    assert {"training", "training.lr", "server.port", "base_model"} <= paths


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


def test_keys_that_are_no_names_are_faults(tmp_path):
    """A number as a key is unknown, at the top too; so are pydantic-settings' own arguments."""
    error = faults(tmp_path, "1: 2\n_cli_parse_args: true\nlora: {r: x}")
    assert {fault["key"] for fault in error.details} == {"1", "_cli_parse_args", "lora.r"}


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


def test_a_fault_in_a_key_is_no_second_fault_in_those_that_need_it(tmp_path):
    """What is told once is enough."""
    error = faults(tmp_path, "training: {eval_fraction: 2, eval_holdout: true, patience: 3}")
    assert [fault["key"] for fault in error.details] == ["training.eval_fraction"]
