"""`update` from files and data sets: what is previewed, what is sent, and what is said when it goes only half way."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import QUICK, Running, a_hub, http

from radiance_mlx import client
from radiance_mlx.cli import output, parts
from radiance_mlx.cli.main import main
from radiance_mlx.messages import Example

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
MIXED = [
    {"messages": CHAT},
    {
        "conversations": [
            {"from": f, "value": v} for f, v in (("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b"))
        ]
    },
    {"instruction": "Count.", "input": "a b", "output": "2"},
    {"text": "Rain fell. " * 200},
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """It takes 52 KB at once, and does not train."""
    settings = {**QUICK, "update_mode": "batched", "server.max_body_mb": 0.05}
    running = Running(tmp_path_factory.mktemp("update"), settings)
    try:
        with http(running.service, running._thread) as made:
            yield running, str(made.base_url)
    finally:
        running.stop()


@pytest.fixture
def call(service: tuple[Running, str], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    def run(*words: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = main(["update", *words, "--json", "--url", service[1]])
        lines = capsys.readouterr().out.splitlines()  # the service in this process logs there too
        return code, json.loads(next(line for line in lines if line.startswith("{")))

    return run


def jsonl(file: Path, rows: list[Any]) -> str:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


def stored(service: tuple[Running, str], job_id: str) -> list[Example]:
    return [example for _, example in service[0].store(lambda s: s.examples_of([job_id]))]


def jobs(service: tuple[Running, str]) -> list[str]:
    return [job.job_id for job in service[0].call(service[0].service.jobs(None, 1000, None))]


# --- the preview -------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a home on which no service runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.yaml").write_text("server: {port: 1}\ntraining: {max_seq_length: 100}\n")
    return ["--home", str(tmp_path / "home")]


def test_a_preview_needs_no_service_and_tells_formats_tokens_and_refusals(
    tmp_path: Path, alone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [*MIXED, "nope", {"input": "a"}])
    assert main(["update", file, "--dry-run", "--json", *alone]) == output.USAGE
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["examples"]) == (6, 5)
    assert found["formats"] == {"chat": 1, "sharegpt": 1, "alpaca": 1, "text": 1}
    assert [refused["place"] for refused in found["refused"]] == ["line 5", "line 6"]
    tokens = found["tokens"]
    assert (tokens["tokenizer"], tokens["max_seq_length"], tokens["cut"]) == ("nano", 100, 1)
    assert tokens["min"] <= tokens["median"] <= tokens["max"] < tokens["total"]
    assert tokens["learnt"] < tokens["total"]
    assert found["shown"][1]["learnt"].startswith("b<|im_end|>")
    assert found["shown"][1]["asked"].endswith("r<|im_end|>\n<|im_start|>assistant\n")
    assert main(["update", file, "--dry-run", "--skip-bad", *alone]) == output.OK
    out, err = capsys.readouterr()
    assert "by the tokenizer of nano" in out
    assert "line 2 (sharegpt, answer 2 of 2)" in out
    assert "line 1 (chat)" in out
    assert "line 6: output: is missing" in out
    assert "nothing was sent" in err


def test_a_preview_of_good_rows_is_well_and_says_which_columns_are_read(
    tmp_path: Path, alone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text("question;answer;id\nWhere?;There.;1\nWho?;Me.;2\n")
    assert main(["update", str(tmp_path / "rows.csv"), "--dry-run", "--json", "--limit", "1", *alone]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["columns"], found["left_out"]) == (1, "input=question,output=answer", ["id"])
    assert found["remarks"] == ["columns are separated by semicolons"]


def test_a_base_that_cannot_be_had_leaves_the_tokens_uncounted(
    tmp_path: Path, alone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home" / "config.yaml").write_text("base_model: ./nowhere\nserver: {port: 1}\n")
    file = jsonl(tmp_path / "rows.jsonl", MIXED[:2])
    assert main(["update", file, "--dry-run", "--json", *alone]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] is None
    assert "nowhere" in found["why_no_tokens"]
    assert found["shown"][0]["learnt"] == "[assistant] a"


def test_what_the_template_refuses_is_refused_in_the_preview(
    tmp_path: Path, alone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    file = jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT, "tools": tools}, {"messages": CHAT}])
    assert main(["update", file, "--dry-run", "--json", *alone]) == output.USAGE
    found = json.loads(capsys.readouterr().out)
    assert (found["formats"], found["examples"]) == ({"chat": 2}, 1)
    assert "no place for tools" in found["refused"][0]["problem"]
    file = jsonl(tmp_path / "tools.jsonl", [{"messages": CHAT, "tools": tools}])
    assert main(["update", file, "--dry-run", *alone]) == output.USAGE
    out = capsys.readouterr().out
    assert "0 examples · formats: chat 1" in out
    assert "tokens: none, for no row can be learnt" in out


# --- what is sent ------------------------------------------------------------------------------------


def test_rows_of_every_format_are_one_job(
    call: Callable[..., tuple[int, Any]], service: tuple[Running, str], tmp_path: Path
) -> None:
    code, queued = call(jsonl(tmp_path / "rows.jsonl", MIXED), "--tag", "t")
    assert (code, set(queued)) == (0, {"job_id", "queued", "checkpoint", "checkpoint_status"})
    assert [e.messages[-1][1] if e.messages else "text" for e in stored(service, queued["job_id"])] == [
        *("a", "a", "b", "2", "text")
    ]
    code, queued = call(jsonl(tmp_path / "rows.jsonl", MIXED), "--answers", "last", "--limit", "2")
    assert len(stored(service, queued["job_id"])) == 2


def test_bad_rows_keep_everything_back_unless_they_are_skipped(
    call: Callable[..., tuple[int, Any]], service: tuple[Running, str], tmp_path: Path
) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, "nope", {"text": ""}, {"text": "b"}])
    before = jobs(service)
    code, body = call(file)
    assert (code, jobs(service)) == (output.USAGE, before)
    assert [fault.partition(":")[0] for fault in body["error"]["details"]] == ["line 2", "line 3"]
    code, queued = call(file, "--skip-bad")
    assert [e.text for e in stored(service, queued["job_id"])] == ["a", "b"]
    assert [skipped["place"] for skipped in queued["skipped"]] == ["line 2", "line 3"]


def test_tables_from_stdin_are_mapped(
    call: Callable[..., tuple[int, Any]], service: tuple[Running, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("q,a\nWo?,D\xf6rt\n".encode("latin-1"))))
    words = ["-", "--format", "csv", "--encoding", "latin-1", "--map", "input=q,output=a"]
    code, queued = call(*words)
    assert code == 0
    assert stored(service, queued["job_id"])[0].messages == (("user", "Wo?"), ("assistant", "Dört"))


def test_a_data_set_is_taught_by_its_columns_and_class_labels_by_their_names(
    call: Callable[..., tuple[int, Any]],
    service: tuple[Running, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {
            "q": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "answers": {"text": [datasets.Value("string")]},
        }
    )
    made = datasets.Dataset.from_list(
        [{"q": f"Who {i}?", "kind": i % 2, "answers": {"text": [f"n{i}"]}} for i in range(4)], features=features
    )
    (tmp_path / "d").mkdir()
    made.to_parquet(str(tmp_path / "d" / "train.parquet"))
    named = ["--dataset", str(tmp_path / "d"), "--split", "train[1:]"]
    _, queued = call(*named, "--map", "input=q,output=kind", "--limit", "2")
    assert [e.messages[1][1] for e in stored(service, queued["job_id"])] == ["dog", "cat"]
    _, queued = call(*named, "--map", "input=q,output=answers.text.0")
    assert [e.messages[1][1] for e in stored(service, queued["job_id"])] == ["n1", "n2", "n3"]
    for words, problem in (
        (named, "No column is known by its name; there are: q, kind, answers"),
        ([*named, "--map", "input=x,output=q"], "There is no column x"),
        (["--dataset", str(tmp_path / "d"), "--split", "test"], "no split test; it has: train"),
        (["--dataset", "./nowhere"], "no such folder or file"),
    ):
        code, body = call(*words)
        assert problem in body["error"]["message"]
        assert (code, body["error"]["code"]) == (output.USAGE, "invalid_request")


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [(404, output.USAGE, "invalid_request"), (503, output.FAILED, "dataset_unavailable")],
    ids=["has it not", "is down"],
)
def test_what_was_named_is_at_fault_if_the_hub_has_it_not_and_the_hub_if_it_is_down(
    call: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch, status: int, code: int, error: str
) -> None:
    """As with a file, the exit code is 2 for a name of nothing, and 1 for what may be had another time."""
    with a_hub(monkeypatch, status):
        ended, body = call("--dataset", "owner/news")
    assert (ended, body["error"]["code"]) == (code, error)
    assert "owner/news" in body["error"]["message"]


@pytest.mark.parametrize("words", ["nowhere.jsonl", "--dataset ./nowhere", "--dataset broken.jsonl"])
def test_a_file_or_data_set_of_this_disk_that_cannot_be_read_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, Any]], words: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text("{")
    code, body = call(*words.split())
    assert (code, body["error"]["code"]) == (output.USAGE, "invalid_request")


# --- in parts ----------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of about 60 KB: more than the service takes at once."""
    monkeypatch.setattr(parts, "ASK_BYTES", 1000)
    return jsonl(tmp_path / "large.jsonl", [{"text": f"{i} " + "x" * 1000} for i in range(60)])


def test_a_large_file_is_named_parts_in_order(
    call: Callable[..., tuple[int, Any]], service: tuple[Running, str], large: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, sent = call(large)
    assert (code, sent["parts"], sent["examples"]) == (0, len(sent["jobs"]), 60)
    assert sent["parts"] > 1
    learnt = [e.text.split()[0] for job in sent["jobs"] for e in stored(service, job["job_id"])]
    assert learnt == [str(i) for i in range(60)]
    assert main(["update", large, "--url", service[1]]) == 0
    assert f"part 2 of {sent['parts']}: job_" in capsys.readouterr().out


def test_what_goes_half_way_is_said_and_can_be_gone_on_with(
    call: Callable[..., tuple[int, Any]],
    service: tuple[Running, str],
    large: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the key that is told, no part is learnt twice."""
    update, sent = client.Client.update, []

    def interrupted(self: client.Client, *args: Any, **options: Any) -> Any:
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(options["idempotency_key"])
        return update(self, *args, **options)

    before = jobs(service)
    with monkeypatch.context() as patch:
        patch.setattr(client.Client, "update", interrupted)
        code, body = call(large)
    error = body["error"]
    assert (code, error["code"]) == (output.FAILED, "half_sent")
    assert f"2 of {error['details']['parts']} parts were accepted" in error["message"]
    assert error["details"]["accepted"] == list(reversed(jobs(service)[: -len(before)]))
    code, again = call(large, "--idempotency-key", error["details"]["idempotency_key"])
    assert [job["job_id"] for job in again["jobs"]][:2] == error["details"]["accepted"]
    assert len(jobs(service)) == len(before) + again["parts"]


def test_a_row_that_fits_into_no_update_is_named_before_anything_is_sent(
    call: Callable[..., tuple[int, Any]], service: tuple[Running, str], tmp_path: Path, large: str
) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "x" * 40_000}])
    before = jobs(service)
    code, body = call(file)
    assert (code, jobs(service)) == (output.USAGE, before)
    assert "line 2 has 0.0 MB" in body["error"]["message"]
