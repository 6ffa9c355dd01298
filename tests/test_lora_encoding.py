"""From examples to tokens: what the model sees, and which of it is learnt."""

import json

import pytest
import tiny
from mlx_lm.tuner.datasets import ChatDataset

from radiance_mlx.curation import curated_files
from radiance_mlx.errors import InvalidRequest
from radiance_mlx.lora.encoding import ChatEncoder
from radiance_mlx.messages import Example
from radiance_mlx.rows import understand

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: as Qwen3 has it: an empty thought before the last answer, and in the prompt when thinking is off
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
#: refuses two turns of one role, as several families' templates do
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}[{{ m['content'] }}]{% endfor %}"
)
PAIR = Example((("user", "Hi?"), ("assistant", "Yes.")))
DIALOGUE = Example((("system", "Be brief."), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D")))


def encoder(template=None, **args):
    return ChatEncoder(tiny.tokenizer(template), args)


def learnt(chat, encoded):
    """The text whose tokens count in the loss."""
    return chat.tokenizer.decode(list(encoded.tokens[max(encoded.offset, 1) :]))


def text(chat, encoded):
    return chat.tokenizer.decode(list(encoded.tokens))


def test_the_template_shapes_prompt_and_example():
    """An example begins with the very prompt that a question with its messages gives."""
    chat = encoder(CHATML)
    encoded = chat.example(PAIR)
    prompt = chat.prompt(PAIR.messages[:1])
    assert chat.tokenizer.decode(prompt) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert list(encoded.tokens[: encoded.offset]) == prompt
    assert learnt(chat, encoded) == "Yes.<|im_end|>\n"
    assert encoded.cut == 0
    assert encoded.targets == len("Yes.") + 2


def test_only_the_last_answer_of_a_dialogue_is_learnt():
    """Earlier turns are context."""
    chat = encoder(CHATML)
    encoded = chat.example(DIALOGUE)
    assert learnt(chat, encoded) == "D<|im_end|>\n"
    assert "Be brief." in text(chat, encoded)


def test_without_masking_all_is_learnt():
    """With `mask_prompt: false` every token but the first is a target, and the tokens are the same."""
    chat = encoder(CHATML)
    masked, whole = chat.example(PAIR), chat.example(PAIR, mask_prompt=False)
    assert whole.tokens == masked.tokens
    assert whole.offset == 0
    assert whole.targets == len(whole.tokens) - 1


def test_without_a_template_the_contents_follow_one_another():
    """A base without a template gets plain text, and its answer ends with the end token."""
    chat = encoder()
    encoded = chat.example(DIALOGUE)
    assert chat.tokenizer.decode(chat.prompt(DIALOGUE.messages[:-1])) == "Be brief.\nA\nB\nC"
    assert list(encoded.tokens[: encoded.offset]) == chat.prompt(DIALOGUE.messages[:-1])
    assert learnt(chat, encoded) == "D<|im_end|>"


@pytest.mark.parametrize("template", [None, CHATML])
def test_plain_text_is_learnt_whole(template):
    """A `text` example passes by the template, has no prompt, and ends with one end token."""
    chat = encoder(template)
    encoded = chat.example(Example(text="abc"))
    assert text(chat, encoded) == "abc<|im_end|>"
    assert encoded.offset == 0
    assert encoded.targets == 3
    assert encoded.tokens == chat.example(Example(text="abc<|im_end|>")).tokens


@pytest.mark.parametrize("thinks", [True, False])
def test_a_thinking_template_learns_what_follows_its_own_prompt(thinks):
    """With thinking off the empty thought belongs to the prompt; with it on, it is learnt before the answer."""
    chat = encoder(THINKING, enable_thinking=thinks)
    encoded = chat.example(PAIR)
    prompt = chat.prompt(PAIR.messages[:1])
    assert list(encoded.tokens[: encoded.offset]) == prompt
    assert chat.tokenizer.decode(prompt).endswith("assistant\n" if thinks else "</think>\n\n")
    thought = "<think>\n\n</think>\n\n" if thinks else ""
    assert learnt(chat, encoded) == f"{thought}Yes.<|im_end|>\n"


def test_a_template_that_answers_otherwise_than_it_prompts():
    """Where the rendered answer leaves the prompt, learning begins."""
    opened = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    chat = encoder(opened)
    encoded = chat.example(PAIR)
    assert chat.tokenizer.decode(chat.prompt(PAIR.messages[:1])).endswith("assistant\n<think>")
    assert learnt(chat, encoded) == "Yes.<|im_end|>\n"
    assert "<think>" not in text(chat, encoded)


def test_a_prompt_that_ends_within_a_token_of_the_whole_is_still_the_prompt_that_is_learnt_on():
    """An opened thought and its line break merge with what follows; the example keeps the asked tokens."""
    opened = THINKING.replace("assistant\n{% if enable_thinking", "assistant\n<think>\n{% if enable_thinking")
    chat = encoder(opened)
    encoded = chat.example(PAIR)
    prompt = chat.prompt(PAIR.messages[:1])
    assert list(encoded.tokens[: encoded.offset]) == prompt
    assert chat.tokenizer.decode(prompt).endswith("<think>\n")
    assert learnt(chat, encoded) == "\n</think>\n\nYes.<|im_end|>\n"


def test_a_template_that_refuses_is_the_callers_fault():
    """What a template raises becomes `InvalidRequest` with its words."""
    chat = encoder(STRICT)
    with pytest.raises(InvalidRequest, match="Roles must alternate"):
        chat.prompt((("user", "a"), ("user", "b")))


@pytest.mark.parametrize("room", [8, 9, 16, 31, 60])
@pytest.mark.parametrize(("asked", "answered"), [(3, 60), (60, 3), (60, 60), (20, 20)])
def test_over_long_examples_are_cut_and_say_by_how_much(asked, answered, room):
    """The answer keeps its start and the prompt its end; the prompt yields down to half of the room first."""
    chat = encoder(CHATML)
    example = Example((("user", "abcdefghij" * 6), ("assistant", "0123456789" * 6)))
    example = Example((("user", example.messages[0][1][:asked]), ("assistant", example.messages[1][1][:answered])))
    whole, cut = chat.example(example), chat.example(example, max_tokens=room)
    assert len(cut.tokens) == room
    assert cut.cut == len(whole.tokens) - room
    prompt, answer = whole.tokens[: whole.offset], whole.tokens[whole.offset :]
    assert cut.tokens[: cut.offset] == prompt[len(prompt) - cut.offset :]
    assert cut.tokens[cut.offset :] == answer[: cut.targets]
    assert cut.targets >= min(len(answer), room // 2)
    assert cut.offset >= min(len(prompt), room // 2, room - len(answer))
    assert cut.targets >= 1


def test_an_example_that_fits_exactly_is_not_cut():
    """`max_tokens` counts whole examples; text is cut at its end."""
    chat = encoder(CHATML)
    whole = chat.example(PAIR)
    assert chat.example(PAIR, max_tokens=len(whole.tokens)) == whole
    assert chat.example(PAIR, max_tokens=len(whole.tokens) - 1).cut == 1
    short = chat.example(Example(text="abcdef"), max_tokens=4)
    assert (text(chat, short), short.cut) == ("abcd", 3)


# --- tools -------------------------------------------------------------------------------------------

WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"b": 1, "a": 2}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"b": 4, "a": 3}'}}
TOOL_CHAT = [
    {"role": "user", "content": "3 + 4?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "7"},
    {"role": "assistant", "content": "Seven."},
]


def understood(chat, **row):
    return understand({"messages": chat, "tools": [TOOL], **row}).examples


def test_tools_and_calls_reach_the_template_in_their_own_order():
    """What a call is made of is learnt, after the tools that were there to be called."""
    chat = encoder(WITH_TOOLS)
    (call,), (answer,) = understood(TOOL_CHAT[:2]), understood(TOOL_CHAT)
    assert learnt(chat, chat.example(call)) == 'add({"b": 4, "a": 3})<|im_end|>\n'
    assert text(chat, chat.example(call)).startswith("<|im_start|>system\n" + json.dumps(TOOL))
    encoded = chat.example(answer)
    assert learnt(chat, encoded) == "Seven.<|im_end|>\n"
    assert "tool\n7<|im_end|>" in text(chat, encoded)


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_template_that_shows_no_tools_refuses_them(template):
    """Rather than to teach something else in silence; calls without a list of tools, too."""
    chat = encoder(template)
    assert not chat.shows_tools
    assert encoder(WITH_TOOLS).shows_tools
    for example in (*understood(TOOL_CHAT), *understood(TOOL_CHAT, tools=None)):
        with pytest.raises(InvalidRequest, match="no place for tools"):
            chat.example(example)


def test_answers_that_are_not_to_be_learnt_are_not_even_where_prompts_are():
    """`training.mask_prompt: false` means everything; a weight of 0 is somebody's own word."""
    chat = encoder(CHATML)
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B", "weight": 0}]
    turns += [{"role": "user", "content": "C"}, {"role": "assistant", "content": "D"}]
    (example,) = understand({"messages": turns}).examples
    assert learnt(chat, chat.example(example, mask_prompt=False)) == "D<|im_end|>\n"
    assert "B" in learnt(chat, chat.example(DIALOGUE, mask_prompt=False))


def test_mlx_lm_trains_on_the_same_tokens_of_a_chat_with_tools():
    """Through its own `ChatDataset`, from what is written for it."""
    chat = encoder(WITH_TOOLS)
    for example in (*understood(TOOL_CHAT[:2]), *understood(TOOL_CHAT)):
        (row,) = curated_files([example])["train.jsonl"].splitlines()
        tokens, offset = ChatDataset([], chat.tokenizer, mask_prompt=True).process(json.loads(row))
        encoded = chat.example(example)
        assert (tuple(tokens), offset) == (encoded.tokens, encoded.offset)
