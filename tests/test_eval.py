"""`eval`: what checkpoints have forgotten, asked of the service and without one."""

import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
import structlog
from running import FACTS, QUICK, REPOSITORY, LoopThread, http, running

from radiance_mlx import offline
from radiance_mlx.cli.main import main
from radiance_mlx.config import load_config
from radiance_mlx.errors import NotFound
from radiance_mlx.evaluation.metrics import NAMES
from radiance_mlx.evaluator import anchor_settings, asked_for
from radiance_mlx.models.nano import world


def write_jsonl(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A home with two checkpoints and local anchors, its service stopped; and a data set beside it."""
    home = tmp_path_factory.mktemp("eval") / "home"
    rows = [{"prompt": q, "completion": a} for q, a in world.facts(world.KNOWN[:4])]
    write_jsonl(home / "data" / "anchors" / "mine.jsonl", rows)
    write_jsonl(home.parent / "news.jsonl", [{"title": f"No. {i}", "body": "Rain fell all day."} for i in range(12)])
    with running(home, QUICK, evaluation__anchor_provider="local") as service:
        for fact in FACTS[:2]:
            service.learn(fact)
    return home


@pytest.fixture(scope="module")
def asked(taught):
    """The same home with a service over HTTP."""
    with running(taught, QUICK, evaluation__anchor_provider="local") as service:
        loop = LoopThread()
        try:
            with http(service.service, service._thread) as client:
                yield client
        finally:
            loop.close()


#: no service is found, and a home's own anchors measure
ALONE = {"RADIANCE_SERVER__PORT": "1", "RADIANCE_EVALUATION__ANCHOR_PROVIDER": "local"}


@pytest.fixture
def command(monkeypatch, capfd):
    """`command(home, *arguments)`: (exit code, stdout, stderr) of `eval`, run by `main` in this process."""

    def run(home, *arguments):
        code = main(["eval", "--home", str(home), *arguments])
        return code, *capfd.readouterr()

    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    yield run
    structlog.reset_defaults()  # the command's log goes to the stderr of its time


def ids(home):
    return sorted(path.name for path in (home / "adapters").glob("A_*"))


def recorded(home, name):
    return json.loads((home / "metrics" / f"{name}.json").read_text())


def evaluated(home, name, against):
    """What `eval` wrote about a checkpoint, by what it was compared with."""
    [file] = (home / "metrics").glob(f"eval_{name}_vs_{against}_*.json")
    return json.loads(file.read_text())


# --- by the service ------------------------------------------------------------------------------


def test_the_service_measures_what_it_measured_when_it_learnt(asked, taught):
    """The same anchors, the same figures; each answer has a file, and says who answers now."""
    body = asked.post("/eval", json={}).raise_for_status().json()
    assert [result["checkpoint"] for result in body["results"]] == ids(taught)
    for result in body["results"]:
        for name in NAMES:
            assert result[name] == pytest.approx(recorded(taught, result["checkpoint"])[name], abs=1e-5)
    assert (body["checkpoint"], body["checkpoint_status"]) == (ids(taught)[1], "stable")
    first, second = (evaluated(taught, *pair) for pair in ((ids(taught)[0], "base"), ids(taught)[::-1]))
    assert [first["forgetting_kl"], second["forgetting_kl"]] == [r["forgetting_kl"] for r in body["results"]]
    assert first["adapter_hash"] != second["adapter_hash"]
    trained = recorded(taught, ids(taught)[0])["run"]
    same = ("versions", "python", "platform", "backend", "device", "seed")
    assert {name: first["run"][name] for name in same} == {name: trained[name] for name in same}
    assert len(first["run"]["config_hash"]) == 64


def test_any_two_checkpoints_can_be_compared(asked, taught):
    """The first from the second's side; against the base the drift is the forgetting."""
    first, second = ids(taught)
    [back] = asked.post("/eval", json={"checkpoints": [first], "against": second}).json()["results"]
    [forth] = asked.post("/eval", json={"checkpoints": [second]}).json()["results"]
    assert back["forgetting_loss_delta"] == pytest.approx(-forth["forgetting_loss_delta"], abs=1e-6)
    [base] = asked.post("/eval", json={"checkpoints": [second], "against": "base"}).json()["results"]
    assert base["drift_kl"] == pytest.approx(base["forgetting_kl"], abs=1e-6)
    [itself] = asked.post("/eval", json={"checkpoints": ["stable"], "against": "stable"}).json()["results"]
    assert abs(itself["drift_kl"]) < 1e-5
    for against, result in ((first, forth), ("base", base), (second, itself)):  # none has overwritten another
        assert evaluated(taught, second, against)["drift_kl"] == result["drift_kl"]


def test_a_stream_tells_how_far_it_is(asked):
    """Events with counts, the answer last, then the end."""
    with asked.stream("POST", "/eval", json={"stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert [(event["done"], event["of"]) for event in events[:-1]] == [(0, 2), (1, 2), (2, 2)]
    assert len(events[-1]["results"]) == 2


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"checkpoints": ["A_2020-01-01_0009"]}, 404, "not_found"),
        ({"checkpoints": ["../../etc"]}, 404, "not_found"),
        ({"checkpoints": ["base"], "against": "nobody"}, 404, "not_found"),
        ({"checkpoints": []}, 422, "invalid_request"),
        ({"anchor_dataset": "/etc/passwd"}, 422, "invalid_request"),
        ({"anchor_dataset": "../secrets"}, 422, "invalid_request"),
        ({"anchor_dataset": "tests"}, 422, "invalid_request"),  # a folder where the service runs
        ({"anchor_provider": "none"}, 422, "invalid_request"),
        ({"adapter_path": "/tmp/x"}, 422, "invalid_request"),
    ],
)
def test_what_cannot_be_measured_is_told(asked, body, status, code, monkeypatch):
    """And no path of the machine comes in over HTTP."""
    monkeypatch.chdir(REPOSITORY)
    answer = asked.post("/eval", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_hub_that_cannot_be_reached_is_an_error_with_advice(asked, monkeypatch):
    """And the service goes on."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1", raising=False)
    answer = asked.post("/eval", json={"anchor_dataset": "nobody/nothing-here"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "anchors_unavailable")
    assert answer.json()["error"]["hint"]
    assert asked.get("/readyz").status_code == 200


def test_all_leaves_out_what_is_damaged(asked, taught, capfd):
    """Somebody's checkpoint.json is broken: the other one is measured all the same, and the log names it."""
    first, second = ids(taught)
    file = taught / "adapters" / first / "checkpoint.json"
    whole = file.read_bytes()
    try:
        for broken in ("{", json.dumps({**json.loads(whole), "files": {}})):
            file.write_text(broken)
            results = asked.post("/eval", json={"against": "base"}).raise_for_status().json()["results"]
            assert [result["checkpoint"] for result in results] == [second]
    finally:
        file.write_bytes(whole)


def test_local_by_name_is_the_homes_own_folder(taught):
    """Also where the base brings anchors and nothing is configured."""
    configured = anchor_settings(load_config(environ={}, home=taught).config, taught)
    assert configured.folder != taught / "data" / "anchors"
    assert asked_for(configured, taught, {"provider": "local"}).folder == taught / "data" / "anchors"
    assert asked_for(configured, taught, {"sample": 3}).folder == configured.folder


def test_a_named_service_is_not_asked_about_files_of_this_machine(capsys):
    """Nor is another home measured instead."""
    for more in (["--adapter-path", "/tmp"], ["--base-model", "nano"], ["--anchor-dataset", "/tmp"]):
        assert main(["eval", "--url", "http://127.0.0.1:1", *more]) == 2
        assert "--url" in capsys.readouterr().err


# --- without one ---------------------------------------------------------------------------------


def test_without_a_service_the_same_is_measured_here(taught):
    """In a process of its own: `--json` has nothing but JSON on stdout; what is stable has that name here too."""
    start = [sys.executable, "-m", "radiance_mlx", "eval", "--home", str(taught)]
    done = subprocess.run(
        [*start, "--checkpoint", "all", "--against", "stable", "--json"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **ALONE},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(r["checkpoint"], r["against"]) for r in results] == [(name, ids(taught)[1]) for name in ids(taught)]
    for result in results:
        assert result["forgetting_kl"] == pytest.approx(
            recorded(taught, result["checkpoint"])["forgetting_kl"], abs=1e-5
        )


def test_stable_is_what_a_service_would_answer_from(taught, tmp_path):
    """Of this base: with another one nothing has been learnt, and there is nothing to measure."""
    first, second = ids(taught)
    base_hash = json.loads((taught / "adapters" / first / "checkpoint.json").read_text())["base_hash"]
    for home, base, name in ((taught, base_hash, second), (taught, "another", "base"), (tmp_path, base_hash, "base")):
        [subject] = offline._subjects(home, ["stable"], "stable", None, base)
        assert (subject.name, subject.parent) == (name, name)
    with pytest.raises(NotFound):
        offline._subjects(taught, None, None, None, "another")


def test_a_fresh_home_measures_the_base_on_a_data_set_of_this_disk(tmp_path, taught, command):
    """`hf` with a path; nothing has been forgotten."""
    news = str(taught.parent / "news.jsonl")
    code, out, err = command(tmp_path / "new", "--anchor-provider", "hf", "--anchor-dataset", news)
    assert code == 0, err
    assert "1.000" in out
    assert "12 anchors" in err
    code, out, _ = command(tmp_path / "new", "--anchor-dataset", news, "--json")
    [result] = json.loads(out)["results"]
    assert (code, result["checkpoint"]) == (0, "base")
    assert abs(result["forgetting_kl"]) < 1e-5


def test_any_adapter_that_mlx_lm_reads_can_be_measured(tmp_path, taught, command):
    """By its folder, which is no checkpoint of this home."""
    first = ids(taught)[0]
    code, out, err = command(tmp_path, "--adapter-path", str(taught / "adapters" / first), "--json")
    assert code != 0  # this home has no anchors
    assert json.loads(out)["error"]["code"] == "anchors_unavailable"
    code, out, err = command(
        tmp_path,
        "--adapter-path",
        str(taught / "adapters" / first),
        "--json",
        "--anchor-provider",
        "hf",
        "--anchor-dataset",
        str(taught / "data" / "anchors"),
    )
    assert code == 0, err
    [result] = json.loads(out)["results"]
    assert result["forgetting_kl"] == pytest.approx(recorded(taught, first)["forgetting_kl"], abs=1e-5)
    [file] = (tmp_path / "metrics").glob("eval_*.json")
    content = json.loads(file.read_text())["adapter_hash"]
    assert file.name.startswith(f"eval_{first}-{content[:8]}_vs_base_")  # other folders may have that name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--checkpoint", "A_2020-01-01_0009"], "no checkpoint A_2020"),
        (["--checkpoint", "base", "--adapter-path", "/tmp"], "exclude each other"),
        (["--adapter-path", "/nowhere"], "no adapter"),
        (["--anchor-dataset", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--against", "A_2020-01-01_0009"], "no checkpoint"),
    ],
)
def test_wrong_arguments_are_one_clear_error(taught, command, arguments, says):
    code, _, err = command(taught, *arguments)
    assert code in (1, 2)
    assert says in err
    assert "Traceback" not in err


def test_an_adapter_of_no_numbers_cannot_be_measured(taught, command, tmp_path):
    """It ends with an error that says so, and writes no metrics."""
    folder = shutil.copytree(next((taught / "adapters").glob("A_*")), tmp_path / "adapter")
    weights = mx.load(str(folder / "adapters.safetensors"))
    name = next(key for key in weights if key.endswith("lora_b"))
    mx.save_safetensors(str(folder / "adapters.safetensors"), {**weights, name: weights[name] * float("nan")})
    home = tmp_path / "home"
    write_jsonl(home / "data" / "anchors" / "mine.jsonl", [{"input": "Hi", "output": "Hello!"}])
    code, out, _ = command(home, "--adapter-path", str(folder), "--json")
    assert code != 0
    assert json.loads(out)["error"]["code"] == "non_finite"
    assert not list(home.glob("metrics/*.json"))
