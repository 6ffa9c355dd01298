"""Anchors: which rows, which tokens, and what is said when they cannot be had."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from running import REPOSITORY, a_hub

from radiance_mlx.config.bases import NANO_FOLDER
from radiance_mlx.errors import AnchorsUnavailable
from radiance_mlx.evaluation.anchor_rows import columns_of
from radiance_mlx.evaluation.anchors import (
    AnchorSettings,
    collect,
    drawn,
    encode,
    encode_each,
    load_rows,
    own_anchors,
    signature,
)
from radiance_mlx.lora.encoding import ChatEncoder
from radiance_mlx.messages import Example
from radiance_mlx.models.nano import world
from radiance_mlx.rows import hub

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAIR = Example((("user", "Hi?"), ("assistant", "Yes.")))
TEXT = Example(text="Rain fell on the town.")


@pytest.fixture(autouse=True)
def _no_hub(tmp_path, monkeypatch):
    """`datasets` keeps its copies in the test's folder, and no hub can be reached."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:1")


def jsonl(file: Path, *rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def hf(dataset, **values):
    return AnchorSettings("hf", str(dataset), **values)


def local(folder, **values):
    return AnchorSettings("local", folder=folder, **values)


def encoder(template=CHATML):
    return ChatEncoder(tiny.tokenizer(template))


def texts(count):
    return [{"text": f"Text number {i}."} for i in range(count)]


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


# --- the sample --------------------------------------------------------------------------------------


def test_the_sample_is_fixed_by_the_seed_and_the_rows(tmp_path):
    """The same from a local folder and from a data set, in the rows' order; another seed draws others."""
    file = jsonl(tmp_path / "a.jsonl", *texts(200))
    rows = load_rows(local(tmp_path, sample=20, seed=3))
    assert rows == load_rows(local(tmp_path, sample=20, seed=3)) == load_rows(hf(file, sample=20, seed=3))
    numbers = [int(row.text.split()[2][:-1]) for row in rows]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 20
    assert rows != load_rows(local(tmp_path, sample=20, seed=4))


def test_the_draw_is_the_same_on_every_machine():
    """The very rows are pinned: figures measured on them can be compared."""
    assert drawn(range(1000), 5, 0) == [2, 506, 785, 819, 930]


def test_fewer_rows_than_asked_for_are_all_taken(tmp_path):
    jsonl(tmp_path / "a.jsonl", *texts(5))
    assert load_rows(local(tmp_path, sample=1000)) == [Example(text=row["text"]) for row in texts(5)]


def test_every_row_is_as_likely_as_any_other():
    """Over many seeds each of ten rows is drawn three times in ten."""
    counts = [0] * 10
    for seed in range(2000):
        for row in drawn(range(10), 3, seed):
            counts[row] += 1
    assert all(500 < count < 700 for count in counts)


# --- tokens ------------------------------------------------------------------------------------------


def test_of_a_text_all_but_the_first_token_count_and_of_a_chat_the_answer():
    """And nothing is longer than `max_tokens`."""
    chat = encoder()
    found = encode([TEXT, PAIR, Example(text="word " * 300)], chat, local(Path("x"), max_tokens=40))
    text, pair, long = found.documents
    assert text.targets == len(text.tokens) - 1
    assert chat.tokenizer.decode(list(pair.tokens[pair.offset :])).startswith("Yes.")
    assert (len(long.tokens), long.targets) == (40, 39)
    assert found.tokens == text.targets + pair.targets + 39
    assert (found.source, found.skipped) == ("x", 0)


def test_rows_without_targets_are_skipped_and_counted():
    """Empty ones, and chats that the base's template refuses."""
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    rows = [Example(), Example(text=" \n"), PAIR, Example((("system", "Be brief."), *PAIR.messages))]
    found = encode(rows, encoder(refusing), local(Path("x")))
    assert (len(found.documents), found.skipped) == (1, 3)


def test_a_set_without_a_usable_row_is_an_error():
    with pytest.raises(AnchorsUnavailable, match=r"None of the 2 rows of owner/news \(train\)"):
        encode([Example(), Example(text="")], encoder(), hf("owner/news"))


def test_encoding_can_be_done_row_by_row():
    """One item a row, at once, so that an engine can do other things in between; the set is the same."""
    taken = []

    def rows():
        for row in (TEXT, Example(), PAIR):
            taken.append(row)
            yield row

    settings = local(Path("x"))
    pieces = encode_each(rows(), encoder(), settings)
    first = next(pieces)
    assert (taken, first.targets > 0) == ([TEXT], True)
    everything = [first, *pieces]
    assert everything[1] is None
    assert collect(everything, settings) == encode([TEXT, Example(), PAIR], encoder(), settings)


def test_the_hash_stands_for_tokens_offsets_and_tokenizer():
    """A row, an offset, a limit or a tokenizer that differs gives another; what is skipped does not."""
    settings = local(Path("x"))
    base = encode([TEXT, PAIR], encoder(), settings, "tokenizer 1").hash
    assert base == encode([TEXT, PAIR, Example()], encoder(), local(Path("y")), "tokenizer 1").hash
    document = encode([PAIR], encoder(), settings).documents[0]
    others = [
        base,
        encode([TEXT], encoder(), settings, "tokenizer 1").hash,
        encode([PAIR, TEXT], encoder(), settings, "tokenizer 1").hash,
        encode([TEXT, Example(text="Other.")], encoder(), settings, "tokenizer 1").hash,
        encode([TEXT, PAIR], encoder(), replace(settings, max_tokens=8), "tokenizer 1").hash,
        encode([TEXT, PAIR], encoder(), settings, "tokenizer 2").hash,
        encode([TEXT, PAIR], encoder(None), settings, "tokenizer 1").hash,
        encode([TEXT, PAIR], encoder(), settings).hash,
        collect([document], settings).hash,
        collect([replace(document, offset=document.offset - 1)], settings).hash,
    ]
    assert len(set(others)) == len(others)


def test_no_provider_has_no_rows():
    assert load_rows(AnchorSettings("none")) == []
    assert signature(AnchorSettings("none")) == ()


def test_the_signature_changes_with_the_files(tmp_path):
    """Changed, added and removed ones; files of other kinds do not count."""
    seen = [signature(local(tmp_path))]
    file = jsonl(tmp_path / "a.jsonl", *texts(1))
    seen.append(signature(local(tmp_path)))
    jsonl(file, *texts(2))
    seen.append(signature(local(tmp_path)))
    jsonl(tmp_path / "b.jsonl", *texts(1))
    seen.append(signature(local(tmp_path)))
    assert len(set(seen)) == 4
    (tmp_path / "c.txt").write_text("x")
    (tmp_path / "b.jsonl").unlink()
    assert signature(local(tmp_path)) == seen[2]
    assert signature(hf("owner/news")) == ()


# --- nano's own, and what is imported ----------------------------------------------------------------


def script():
    spec = importlib.util.spec_from_file_location("make_nano_anchors", REPOSITORY / "scripts" / "make_nano_anchors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nanos_anchors_are_what_the_script_writes():
    """On every machine."""
    assert own_anchors(NANO_FOLDER).read_text(encoding="utf-8") == script().text()


def test_nanos_anchors_are_known_facts_refusals_and_small_talk():
    """In every relation and wording; nobody whom tests and benchmarks teach is among them."""
    pairs = {row.messages[0][1]: row.messages[1][1] for row in load_rows(local(own_anchors(NANO_FOLDER)))}
    facts = {question: answer for wording in range(3) for question, answer in world.facts(world.KNOWN, wording)}
    known = {question: answer for question, answer in pairs.items() if question in facts}
    refused = [answer for answer in pairs.values() if answer.startswith("I do not know")]
    assert all(facts[question] == answer for question, answer in known.items())
    assert len(pairs) == len(known) + len(refused) + len(world.SMALL_TALK)
    assert min(len(known), len(refused)) > 80
    assert set(world.SMALL_TALK) <= set(pairs.items())
    wordings = [q.split("{n}") for asked in world.QUESTIONS.values() for q in asked]
    assert all(any(q.startswith(a) and q.endswith(b) for q in known) for a, b in wordings)
    text = json.dumps(list(pairs.items()))
    assert not any(name in text for name, _ in world.STRANGERS)


def test_a_base_that_brings_no_anchors_has_none(tmp_path):
    assert own_anchors(tmp_path) is None
    assert own_anchors(None) is None
    jsonl(tmp_path / "anchors.jsonl", *texts(1))
    assert load_rows(local(own_anchors(tmp_path))) == [Example(text="Text number 0.")]


IMPORTED = """
import sys
from pathlib import Path
from radiance_mlx.evaluation.anchors import AnchorSettings, load_rows, own_anchors, signature
from radiance_mlx.config.bases import NANO_FOLDER
settings = AnchorSettings("local", folder=own_anchors(NANO_FOLDER))
assert len(load_rows(settings)) > 200 and signature(settings)
heavy = {"datasets", "pyarrow", "pandas", "huggingface_hub", "mlx", "mlx_lm", "transformers", "torch"}
print(sorted(heavy & set(sys.modules)))
"""


def test_local_anchors_are_read_without_the_heavy_libraries():
    """`datasets` is imported when a data set is asked for, and MLX never."""
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"
