"""Anchors: which rows are drawn, which of their tokens count, and nano's own."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from anchor_files import PAIR, TEXT, hf, jsonl, local, texts
from anchor_files import _no_hub as _no_hub
from running import REPOSITORY

from radiance_mlx.config.bases import NANO_FOLDER
from radiance_mlx.errors import AnchorsUnavailable
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

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoder(template=CHATML):
    return ChatEncoder(tiny.tokenizer(template))


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
