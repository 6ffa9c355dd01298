"""Files for fine-tuning: what is taken, how its rows are read, and what is refused."""

import json

import openai
import pytest
from running import FACTS
from tuning import chat, ended, jsonl, upload
from tuning import client as client
from tuning import started as started

from radiance_mlx.errors import InvalidRequest
from radiance_mlx.messages import Example
from radiance_mlx.rows.lines import examples_of_jsonl

#: an upload as it goes over the wire
PURPOSE = b'--y\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
WHOLE = PURPOSE + (
    b'--y\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{"text": "Rain fell."}\r\n--y--\r\n'
)
MULTIPART = {"content-type": "multipart/form-data; boundary=y"}


def test_files_are_listed_read_and_deleted(started, client):
    """Byte for byte, multi-byte characters included; a job that was made of one does not miss it."""
    odd = jsonl(("Où habite José?", "À Zürich 🎉."))
    file = client.files.create(file=("réponses.jsonl", odd), purpose="fine-tune")
    assert client.files.content(file.id).read() == odd
    assert client.files.retrieve(file.id).filename == "réponses.jsonl"
    assert client.files.list(limit=1).data[0].id == file.id
    assert [f.id for f in client.files.list(order="asc", limit=2)][-1] == file.id
    assert list(client.files.list(purpose="batch")) == []
    job = client.fine_tuning.jobs.create(model="stable", training_file=file.id, hyperparameters={"n_epochs": 1})
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)
    done = ended(client, job)
    assert done.training_file == file.id
    assert file.id not in [f.id for f in client.files.list()]
    assert not (started.service.home / "data" / "files" / file.id).exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no line"),
        (b"\n \n", "no line"),
        (b"{", "line 1: not JSON"),
        (b"\xff\n", "line 1: not UTF-8"),
        (jsonl(FACTS[0]) + b"[]\n", "line 2: an example must be an object"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "line 1: messages: must be a list of at least two"),
        (b'{"prompt": "a"}', "line 1: completion: is missing"),
        (json.dumps({**chat("a", "b"), "topic": "c"}).encode(), "line 1: topic: is not a key beside messages"),
        (json.dumps(chat("a", "")).encode(), "must not be empty"),
    ],
)
def test_a_file_with_a_bad_line_is_refused_and_the_line_named(client, content, told):
    before = len(list(client.files.list()))
    with pytest.raises(openai.BadRequestError, match=told) as caught:
        client.files.create(file=("a.jsonl", content), purpose="fine-tune")
    assert (caught.value.param, caught.value.code) == ("file", "invalid_file")
    assert len(list(client.files.list())) == before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            json.dumps({"conversations": [{"from": f, "value": f} for f in ("human", "gpt") * 1500]}).encode(),
            "line 1: 1500",
        ),
        (b'{"text": "ab"}\n' * 100_001, "more than 100,000 examples"),
    ],
    ids=["one chat", "many rows"],
)
def test_a_file_that_becomes_too_much_is_refused(client, content, told):
    with pytest.raises(openai.BadRequestError, match=told) as caught:
        client.files.create(file=("a.jsonl", content), purpose="fine-tune")
    assert (caught.value.param, caught.value.code) == ("file", "invalid_file")


def test_every_bad_line_is_found():
    with pytest.raises(InvalidRequest) as caught:
        examples_of_jsonl(b"".join([jsonl(FACTS[0]), b"{\n"] * 7))
    assert [fault["line"] for fault in caught.value.details] == [2, 4, 6, 8, 10, 12, 14]
    assert "line 10" in caught.value.message
    assert "and 2 more" in caught.value.message


def test_a_file_takes_every_row_that_an_update_takes(started):
    """ShareGPT, Alpaca, weights, mlx-lm's and pairs in one file; of a chat each answer is learnt."""
    a, b, c = FACTS[:3]
    said = [("human", a[0]), ("gpt", a[1]), ("human", b[0]), ("gpt", b[1])]
    weighted = chat(*a)["messages"] + chat(*b)["messages"] + chat(*c)["messages"]
    weighted[1]["weight"] = 0
    rows = [
        {"conversations": [{"from": speaker, "value": value} for speaker, value in said]},
        {"instruction": c[0], "input": "", "output": c[1]},
        {"messages": weighted},
        {"messages": chat(*a)["messages"] + chat(*b)["messages"]},
        {"prompt": a[0], "completion": a[1]},
        {"input": b[0], "output": b[1]},
        {"text": " ".join(c)},
    ]
    content = "\n".join(map(json.dumps, rows)).encode()
    file = started.client.files.create(file=("all.jsonl", content), purpose="fine-tune")
    assert file.examples == 2 + 1 + 2 + 2 + 1 + 1 + 1
    job = started.client.fine_tuning.jobs.create(
        model="stable", training_file=file.id, validation_file=file.id, hyperparameters={"n_epochs": 1}
    )
    ended(started.client, job)
    turns = [tuple(("user", "assistant")[n % 2] for n in range(length)) for length in (2, 4, 6)]
    learnt = [example for _, example in started.service.store(lambda s: s.examples_of([job.job_id]))]
    assert [tuple(role for role, _ in example.messages) for example in learnt] == [
        *(turns[0], turns[1]),  # of the ShareGPT row
        turns[0],
        *(turns[1], turns[2]),  # of the weighted one: not its first answer
        *(turns[0], turns[1]),
        *(turns[0], turns[0], ()),
    ]
    assert [example.answer_only for example in learnt] == [
        False,
        True,
        False,
        True,
        True,
        False,
        True,
        False,
        False,
        False,
    ]
    assert (learnt[0].messages[1][1], learnt[1].messages[3][1]) == (a[1], b[1])
    assert (learnt[3].messages[3][1], learnt[4].messages[5][1]) == (b[1], c[1])
    assert started.service.store(lambda s: s.tunings.validation([job.job_id])) == tuple(learnt)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'prompt,completion\n"Who, then?",Ada\nAnd?,Ben\n'),
        ("a.TSV", "question\tanswer\nWho, then?\tAda\nAnd?\tBen\n"),
        ("a.json", json.dumps([{"instruction": "Who, then?", "output": "Ada"}, {"input": "And?", "output": "Ben"}])),
    ],
)
def test_tables_and_json_documents_are_files_too(started, name, content):
    """By the file's name; what is asked for a job is read the same way."""
    file = started.client.files.create(file=(name, content.encode()), purpose="fine-tune")
    assert file.examples == 2
    job = started.client.fine_tuning.jobs.create(model="stable", training_file=file.id, hyperparameters={"n_epochs": 1})
    ended(started.client, job)
    learnt = [example for _, example in started.service.store(lambda s: s.examples_of([job.job_id]))]
    assert [[content for _, content in e.messages] for e in learnt] == [["Who, then?", "Ada"], ["And?", "Ben"]]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"prompt,completion,source\nWho?,Ada,web\n", "columns source would not be learnt"),
        ("a.csv", b"prompt,completion\nWho?\n", "line 2"),
        ("a.csv", b"prompt,completion\n", "no row"),
        ("a.json", b'{"examples": [{"input": "a", "output": "b"}], "tags": ["x"]}', "tags x would not be learnt"),
        ("a.json", b'{"examples": [{"input": "a", "output": "b"}], "tags": 5}', "tags must be a list of texts"),
        ("a.json", b'{"examples": [{"input": "a", "output": "b"}], "tags": "xy"}', "tags must be a list of texts"),
        ("a.json", b'{"data": [{"input": "a", "output": "b"}], "system": "x"}', "keys system would not be learnt"),
        ("a.json", b"[1]", "example|row|entry"),
    ],
)
def test_of_a_table_or_document_nothing_is_passed_over(client, name, content, told):
    with pytest.raises(openai.BadRequestError, match=told):
        client.files.create(file=(name, content), purpose="fine-tune")


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_tools_that_the_base_cannot_show_make_no_job(client, param):
    """The file is sound, and kept for a base that can."""
    plain, tool = upload(client, FACTS[0]), {"type": "function", "function": {"name": "f"}}
    content = json.dumps({**chat(*FACTS[0]), "tools": [tool]}).encode()
    file = client.files.create(file=("tools.jsonl", content), purpose="fine-tune")
    before = len(client.fine_tuning.jobs.list().data)
    with pytest.raises(openai.BadRequestError, match="no place") as caught:
        client.fine_tuning.jobs.create(**{"model": "stable", "training_file": plain.id, param: file.id})
    assert (caught.value.param, caught.value.code) == (param, "invalid_file")
    assert len(client.fine_tuning.jobs.list().data) == before
    assert client.files.retrieve(file.id).examples == 1


def test_each_assistants_message_is_an_example_unless_its_weight_is_0():
    """With all that stands before it; parts are joined, a developer is a system."""
    said = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 1},
        {"role": "assistant", "content": "e"},
    ]
    turns = (("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    found = examples_of_jsonl(b"\xef\xbb\xbf" + json.dumps({"messages": said}).encode() + b"\r\n")
    assert found == [Example(turns, answer_only=True), Example((*turns, ("assistant", "e")), answer_only=True)]


def charset(name):
    return {"content-type": f"{MULTIPART['content-type']}; charset={name}"}


def test_an_upload_that_is_none_is_refused(started):
    """Another purpose, another kind of body, no file, too large a one."""
    with pytest.raises(openai.BadRequestError) as caught:
        started.client.files.create(file=("a.jsonl", jsonl(FACTS[0])), purpose="assistants")
    assert (caught.value.param, caught.value.code) == ("purpose", "unsupported_value")
    post = started.http.post
    assert post("/v1/files", json={}).json()["error"]["code"] == "unsupported_media_type"
    for options, code in (
        ({"data": {"purpose": "fine-tune"}, "files": {"other": b"a"}}, "unknown_parameter"),
        ({"files": {"file": b"a"}}, "missing_required_parameter"),
        ({"files": {"purpose": (None, "fine-tune")}}, "missing_required_parameter"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=y"}}, "malformed_body"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, "malformed_body"),
        ({"content": WHOLE[:-4], "headers": MULTIPART}, "malformed_body"),
        ({"content": WHOLE[:-30], "headers": MULTIPART}, "malformed_body"),
        ({"content": PURPOSE + WHOLE, "headers": MULTIPART}, "invalid_value"),
        ({"content": WHOLE, "headers": charset("utf-7")}, "unsupported_media_type"),
        ({"content": WHOLE, "headers": charset("no-such")}, "unsupported_media_type"),
        ({"files": {"file": ("a.jsonl", b" " * (17 << 20))}}, "payload_too_large"),
    ):
        response = post("/v1/files", **options)
        assert response.json()["error"]["code"] == code, response.text
    for headers in (MULTIPART, charset("UTF-8")):
        assert post("/v1/files", content=WHOLE, headers=headers).json()["examples"] == 1
