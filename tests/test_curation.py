"""Accepted examples as files for `mlx_lm.lora --data`."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset

from radiance_mlx.config.bases import NANO_FOLDER
from radiance_mlx.curation import curated_files
from radiance_mlx.lora.encoding import ChatEncoder
from radiance_mlx.messages import Example

PAIR = Example(messages=(("user", "Who is Zoë?"), ("assistant", "A friend.\nReally.")))
CHAT = Example(messages=(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")))
TEXT = Example(text="Plain text, with “quotes” and a\ttab.")


def rows(data):
    return [json.loads(line) for line in data.decode().split("\n") if line]


def test_pairs_alone_are_written_as_prompt_and_completion():
    files = curated_files([PAIR, PAIR])
    assert list(files) == ["train.jsonl"]
    assert rows(files["train.jsonl"]) == [{"prompt": "Who is Zoë?", "completion": "A friend.\nReally."}] * 2


def test_pairs_beside_chats_become_chats_since_one_file_has_one_format():
    files = curated_files([PAIR, CHAT])
    assert list(files) == ["train.jsonl"]
    assert [set(row) for row in rows(files["train.jsonl"])] == [{"messages"}, {"messages"}]
    assert rows(files["train.jsonl"])[0]["messages"][0] == {"role": "user", "content": "Who is Zoë?"}


def test_text_alone_is_the_training_file_and_beside_chats_a_file_of_its_own():
    assert rows(curated_files([TEXT])["train.jsonl"]) == [{"text": TEXT.text}]
    files = curated_files([TEXT, PAIR])
    assert set(files) == {"train.jsonl", "text.jsonl"}
    assert rows(files["text.jsonl"]) == [{"text": TEXT.text}]


texts = st.text(min_size=1).filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))
examples = st.one_of(
    texts.map(lambda text: Example(text=text)),
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), min_size=2, max_size=4).map(
        lambda messages: Example(messages=tuple(messages))
    ),
)


@given(st.lists(examples, min_size=1, max_size=6))
def test_no_example_is_lost_and_every_file_has_one_format(given_examples):
    """Whatever characters they hold: line and paragraph separators do not split a row."""
    files = curated_files(given_examples)
    found = []
    for data in files.values():
        assert len({frozenset(row) for row in rows(data)}) == 1
        found += [Example.from_dict(row) for row in rows(data)]
    assert sorted(map(repr, found)) == sorted(map(repr, given_examples))


@pytest.fixture(scope="module")
def tokenizer():
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(NANO_FOLDER)


@pytest.mark.parametrize("given_examples", [[PAIR], [PAIR, CHAT], [TEXT]])
def test_mlx_lm_loads_the_files_and_trains_on_the_tokens_that_the_service_trains_on(
    given_examples, tokenizer, tmp_path
):
    """Through mlx-lm's own `load_local_dataset`, with the prompt masked."""
    for name, data in curated_files(given_examples).items():
        (tmp_path / name).write_bytes(data)
    config = SimpleNamespace(mask_prompt=not given_examples[0].text)
    train, _, _ = load_local_dataset(tmp_path, tokenizer, config)
    theirs = CacheDataset(train)
    encoder = ChatEncoder(tokenizer)
    ours = [encoder.example(e) for e in given_examples]
    assert [(tuple(tokens), offset) for tokens, offset in theirs] == [(e.tokens, e.offset) for e in ours]
