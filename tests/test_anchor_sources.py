"""Where anchors come from, and in which columns they are found; what is said when they cannot be had."""

import shutil
import time
from pathlib import Path

import pytest
from anchor_files import PAIR, TEXT, hf, jsonl, local, texts
from anchor_files import _no_hub as _no_hub
from running import a_hub

from radiance_mlx.errors import AnchorsUnavailable
from radiance_mlx.evaluation.anchor_rows import columns_of
from radiance_mlx.evaluation.anchors import load_rows, signature
from radiance_mlx.messages import Example
from radiance_mlx.rows import hub

# --- local -------------------------------------------------------------------------------------------


def test_local_rows_are_those_of_every_jsonl_file_in_the_order_of_names(tmp_path):
    """In all four forms; blank lines, a byte order mark and files of other kinds do not matter."""
    chat = [{"role": "system", "content": "Be brief."}]
    chat += [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    jsonl(tmp_path / "b.jsonl", {"messages": chat}, {"text": TEXT.text})
    jsonl(tmp_path / "a.jsonl", {"input": "Hi?", "output": "Yes."}, {"prompt": "Hi?", "completion": "Yes."})
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + (tmp_path / "a.jsonl").read_bytes() + b"  \r\n")
    (tmp_path / "notes.txt").write_text("not a row")
    long = Example((("system", "Be brief."), *PAIR.messages))
    assert load_rows(local(tmp_path)) == [PAIR, PAIR, long, TEXT]


def test_one_file_serves_as_the_folder(tmp_path):
    """So that a base's own file can be named, whatever lies beside it."""
    file = jsonl(tmp_path / "anchors.jsonl", {"text": TEXT.text})
    jsonl(tmp_path / "other.jsonl", {"text": "not this"})
    assert load_rows(local(file)) == [TEXT]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "x"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"question": "x"}', "question"),
        (b'{"text": ""}', "text: must not be empty"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "at least two"),
        (b"7", "an object"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, problem):
    """Even when the sample would not have drawn it."""
    jsonl(tmp_path / "good.jsonl", *texts(2))
    (tmp_path / "zzz.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(AnchorsUnavailable, match=rf"zzz\.jsonl, line 3: .*{problem}") as caught:
        load_rows(local(tmp_path, sample=1))
    assert "{messages}" in caught.value.hint


@pytest.mark.parametrize("made", ["nothing", "folder", "empty file"])
def test_where_there_are_no_rows_the_error_says_what_to_put_where(tmp_path, made):
    folder = tmp_path / "anchors"
    if made != "nothing":
        folder.mkdir()
    if made == "empty file":
        (folder / "a.jsonl").write_text("\n")
    with pytest.raises(AnchorsUnavailable, match="anchors") as caught:
        load_rows(local(folder))
    assert "*.jsonl" in caught.value.hint
    assert str(folder) in caught.value.message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """Here a folder that has a file's name."""
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(AnchorsUnavailable, match=r"a\.jsonl"):
        load_rows(local(tmp_path))


def test_a_folder_that_may_not_be_entered_is_named(tmp_path, monkeypatch):
    """Permissions are the user's to mend."""

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(AnchorsUnavailable, match="Permission denied"):
        load_rows(local(tmp_path))


# --- hf ----------------------------------------------------------------------------------------------


def write_table(file: Path, rows) -> None:
    import datasets

    table = datasets.Dataset.from_list(rows)
    {".csv": table.to_csv, ".parquet": table.to_parquet, ".json": table.to_json, ".jsonl": table.to_json}[file.suffix](
        str(file)
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "ro?ws [1].jsonl"])
def test_a_file_on_this_disk_is_a_data_set(tmp_path, name):
    """Of each kind, and with a name that looks like a pattern."""
    write_table(tmp_path / name, [{"prompt": "Hi?", "completion": "Yes.", "n": 1}] * 3)
    assert load_rows(hf(tmp_path / name)) == [PAIR] * 3


def test_a_text_file_has_one_row_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert load_rows(hf(tmp_path / "a.txt")) == [Example(text="one"), Example(text="two")]


def test_a_folder_is_a_data_set_with_the_splits_that_its_files_name(tmp_path):
    """A part of a split can be asked for as `datasets` spells it."""
    jsonl(tmp_path / "d" / "train.jsonl", *texts(4))
    jsonl(tmp_path / "d" / "test.jsonl", {"text": "held out"})
    assert len(load_rows(hf(tmp_path / "d"))) == 4
    assert load_rows(hf(tmp_path / "d", split="test")) == [Example(text="held out")]
    assert len(load_rows(hf(tmp_path / "d", split="train[:50%]"))) == 2


def test_a_changed_file_is_read_again(tmp_path):
    """Though `datasets` keeps a copy; and its signature changes."""
    file = jsonl(tmp_path / "a.jsonl", {"text": "before"})
    before = signature(hf(file))
    assert load_rows(hf(file)) == [Example(text="before")]
    assert signature(hf(file)) == before
    jsonl(file, {"text": "now"})
    assert load_rows(hf(file)) == [Example(text="now")]
    assert signature(hf(file)) != before


@pytest.mark.parametrize("split", ["test", "tra[", "train+nothing"])
def test_a_split_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path, split):
    file = jsonl(tmp_path / "d" / "train.jsonl", *texts(2))
    jsonl(tmp_path / "d" / "validation.jsonl", *texts(2))
    with pytest.raises(AnchorsUnavailable, match=r"it has: train, validation") as caught:
        load_rows(hf(file.parent, split=split))
    assert "anchor_split" in caught.value.hint


def test_a_named_column_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {"story": "x", "n": 1})
    with pytest.raises(AnchorsUnavailable, match="no column text, body; it has: story, n"):
        load_rows(hf(file, columns=("text", "body")))
    with pytest.raises(AnchorsUnavailable, match=r"No text was found.*: story, n") as caught:
        load_rows(hf(file))
    assert "anchor_columns" in caught.value.hint
    assert load_rows(hf(file, columns=("story",))) == [Example(text="x")]


@pytest.mark.parametrize(
    ("content", "name"),
    [(b'{"text": \n', "a.jsonl"), (b"not parquet", "a.parquet"), (b"", "a.jsonl"), (b"x", "a.docx")],
)
def test_a_file_that_is_broken_or_of_no_known_kind_is_named(tmp_path, content, name):
    """No error of the libraries below comes through."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AnchorsUnavailable) as caught:
        load_rows(hf(tmp_path / name))
    assert name in caught.value.message
    assert caught.value.hint


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(AnchorsUnavailable, match=str(tmp_path / "d")):
        load_rows(hf(tmp_path / "d"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing/at/all", "rows.jsonl", "a b", ""])
def test_a_path_to_nothing_is_not_looked_for_on_the_hub(name):
    with pytest.raises(AnchorsUnavailable, match="no such folder or file"):
        load_rows(hf(name))


def test_progress_bars_are_left_as_they_were(tmp_path):
    """They are off while a set is read, for the log's sake."""
    from datasets.utils import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    load_rows(hf(jsonl(tmp_path / "a.jsonl", *texts(2))))
    assert are_progress_bars_disabled() == before


# --- the hub -----------------------------------------------------------------------------------------


def test_without_a_network_the_error_comes_at_once(monkeypatch):
    """No retries; the message names the data set and the hint says what else can be done."""
    started = time.monotonic()
    with pytest.raises(AnchorsUnavailable, match="owner/news") as caught:
        load_rows(hf("owner/news"))
    assert time.monotonic() - started < 5
    assert "network" in caught.value.hint
    assert caught.value.code == "anchors_unavailable"


@pytest.mark.parametrize("status", [404, 401, 503])
def test_what_the_hub_refuses_is_asked_for_once(monkeypatch, status):
    with a_hub(monkeypatch, status) as asked, pytest.raises(AnchorsUnavailable, match="owner/news"):
        load_rows(hf("owner/news"))
    assert len(asked) == 1


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hub, "HUB_TIMEOUT_S", 0.3)
    started = time.monotonic()
    with a_hub(monkeypatch), pytest.raises(AnchorsUnavailable, match="Timeout"):
        load_rows(hf("owner/news"))
    assert time.monotonic() - started < 5


def test_a_copy_made_earlier_serves_when_the_hub_cannot_be_reached(tmp_path):
    """As `datasets` leaves it: here one made of a local folder, and renamed."""
    jsonl(tmp_path / "owner___news" / "train.jsonl", *texts(3))
    rows = load_rows(hf(tmp_path / "owner___news"))
    for file in (tmp_path / "cache" / "owner___news").rglob("*.arrow"):
        file.rename(file.with_name("news-train.arrow"))
    shutil.rmtree(tmp_path / "owner___news")
    assert load_rows(hf("owner/news")) == rows
    with pytest.raises(AnchorsUnavailable, match="it has: train"):
        load_rows(hf("owner/news", split="test"))


# --- columns -----------------------------------------------------------------------------------------


CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": CHAT, "text": "rendered"}, PAIR),
        ({"messages": [*CHAT, {"role": "user", "content": "Thanks."}]}, PAIR),
        ({"Prompt": "Hi?", "Completion": "Yes."}, PAIR),
        ({"question": "Hi?", "answer": "Yes.", "text": "both"}, PAIR),
        ({"input": "Hi?", "output": "Yes."}, PAIR),
        ({"instruction": "Hi?", "input": "", "output": "Yes."}, PAIR),
        (
            {"instruction": "Count.", "input": "a b", "output": "2"},
            Example((("user", "Count.\n\na b"), ("assistant", "2"))),
        ),
        ({"n": 1, "content": "x"}, Example(text="x")),
        ({"article": "x"}, Example(text="x")),
        ({"document": "x"}, Example(text="x")),
        ({"body": "x", "Title": "T"}, Example(text="T\n\nx")),
        ({"headline": "T", "text": "x", "url": "u"}, Example(text="T\n\nx")),
        ({"text": None}, Example()),
        ({"question": "Hi?", "answer": " "}, Example()),
        ({"messages": CHAT[:1]}, Example()),
        ({"messages": [{"role": "user", "content": ["parts"]}, CHAT[1]]}, Example()),
        ({"messages": None}, Example()),
    ],
    ids=repr,
)
def test_columns_are_found_by_their_usual_names(row, expected):
    """In any case; a chat before a pair, a pair before a text. What holds no text is an empty example."""
    kinds = {name: name.lower() not in ("messages", "n") for name in row}
    assert columns_of(kinds).example(row) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (("q", "a"), PAIR),
        (("a",), Example(text="Yes.")),
        (("turns",), PAIR),
        (("title", "a"), Example(text="T\n\nYes.")),
        (("q", "a", "title"), Example(text="Hi?\n\nYes.\n\nT")),
        (("content", "title"), Example(text="T\n\nC")),
        (("n",), Example()),
    ],
)
def test_columns_can_be_named(wanted, expected):
    """One is a text or a chat, two a prompt and its answer, a title and more are joined."""
    row = {"q": "Hi?", "a": "Yes.", "title": "T", "content": "C", "turns": CHAT, "n": 7}
    kinds = {name: name not in ("turns", "n") for name in row}
    assert columns_of(kinds, wanted).example(row) == expected


def test_columns_of_real_tables_are_told_by_what_they_hold(tmp_path):
    """A `messages` column of strings is no chat; one of `datasets`' own lists is."""
    write_table(tmp_path / "chat.parquet", [{"messages": CHAT, "text": "no"}])
    assert load_rows(hf(tmp_path / "chat.parquet")) == [PAIR]
    write_table(tmp_path / "odd.parquet", [{"messages": "said", "text": "yes"}])
    assert load_rows(hf(tmp_path / "odd.parquet")) == [Example(text="yes")]
