"""Rows of every known format: what they mean, what is refused, where they are read from."""

import contextlib
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radiance_mlx.api.bodies import parse_update
from radiance_mlx.errors import InvalidRequest, PayloadTooLarge, RadianceError
from radiance_mlx.messages import Example
from radiance_mlx.rows import understand
from radiance_mlx.rows.columns import find_map, parse_map
from radiance_mlx.rows.files import read
from radiance_mlx.rows.intake import Intake, Refused, Taken
from radiance_mlx.rows.limits import Room
from radiance_mlx.rows.lines import examples_of_jsonl

ASKED = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
PAIR = Example((("user", "q"), ("assistant", "a")))
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": 2}'}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": 2}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "3"}


def learnt(row: Any, **options: Any) -> list[tuple[str, ...]]:
    """The contents of each example that the row is."""
    return [tuple(content for _, content in e.messages) or (e.text,) for e in understand(row, **options).examples]


# --- forms -------------------------------------------------------------------------------------------

GOOD = [
    ("pairs", {"input": "q", "output": "a"}),
    ("completions", {"prompt": "q", "completion": "a"}),
    ("chat", {"messages": [ASKED, ANSWER]}),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]}),
    ("chat", {"messages": [ASKED, {**ANSWER, "refusal": None, "tool_calls": None, "weight": 1}]}),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}),
    ("alpaca", {"instruction": "q", "output": "a"}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": "x1"}),
    ("sharegpt", {"conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
]


@pytest.mark.parametrize(("form", "row"), GOOD, ids=repr)
def test_the_same_lesson_in_every_format_is_the_same_example(form: str, row: Any) -> None:
    found = understand(row)
    assert (found.format, found.examples) == (form, (PAIR,))


def test_what_an_instruction_is_about_and_a_system_prompt_are_part_of_what_is_asked() -> None:
    row = {"instruction": "Count.", "input": "a b", "output": "2", "system": "Be brief."}
    assert learnt(row) == [("Be brief.", "Count.\n\na b", "2")]
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}
    assert learnt(sharegpt) == [("s", "q", "a")]


def test_text_parts_are_joined_and_developers_are_the_system() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    row = {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}, ANSWER]}
    assert understand(row).examples[0].messages == (("system", "s"), ("user", "one two"), ("assistant", "a"))


@pytest.mark.parametrize(
    ("weights", "answers", "expected"),
    [
        ((None, None), None, ["a2"]),
        ((0, None), None, ["a2"]),
        ((1, 0), None, ["a1"]),
        ((1, None), None, ["a1", "a2"]),
        ((None, None), True, ["a1", "a2"]),
        ((0, None), True, ["a2"]),
    ],
)
def test_weights_say_which_answers_are_learnt(
    weights: tuple[int | None, ...], answers: bool | None, expected: list[str]
) -> None:
    """Of a chat without weights the last one is, or every one if that is asked for."""
    chat = []
    for i, weight in enumerate(weights, 1):
        chat += [ASKED, {"role": "assistant", "content": f"a{i}", "weight": weight}]
    examples = understand({"messages": chat}, every_answer=answers).examples
    assert [e.messages[-1][1] for e in examples] == expected
    with_earlier = [e for e in examples if len(e.messages) > 2]
    assert all(e.answer_only for e in with_earlier) or (weights, answers) == ((None, None), None)


def test_every_answer_of_a_sharegpt_row_is_learnt_and_what_nobody_answers_is_not() -> None:
    turns = ["gpt: hello", "human: q1", "gpt: a1", "human: q2", "gpt: a2", "human: bye"]
    row = {"conversations": [dict(zip(("from", "value"), t.split(": "), strict=True)) for t in turns]}
    assert [e[-1] for e in learnt(row)] == ["a1", "a2"]
    with pytest.raises(InvalidRequest, match="last message"):
        learnt(row, every_answer=False)


def test_tools_calls_and_results_stay_as_they_were_and_arguments_are_objects() -> None:
    """In the order that they came in: templates show it."""
    row = {"messages": [ASKED, CALLING, RESULT, ANSWER], "tools": [TOOL], "parallel_tool_calls": False}
    (example,) = understand(row).examples
    assert json.loads(example.tools) == [TOOL]
    assert example.chat()[1] == {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    assert list(example.chat()[1]["tool_calls"][0]["function"]["arguments"]) == ["b", "a"]
    assert example.chat()[2] == RESULT
    assert learnt({"messages": [ASKED, CALLING], "tools": [TOOL]}) == [("q", "")]


def test_functions_of_older_clients_are_tools() -> None:
    called = {"name": "f", "arguments": '{"b": 1, "a": 2}'}
    old = [ASKED, {"role": "assistant", "content": None, "function_call": called}]
    old += [{"role": "function", "name": "f", "content": "3"}, ANSWER]
    (example,) = understand({"messages": old, "functions": [TOOL["function"]]}).examples
    assert json.loads(example.tools) == [TOOL]
    assert [role for role, _ in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.chat()[1]["tool_calls"] == [{"type": "function", "function": CALLED["function"]}]
    said = [("human", "q"), ("function_call", json.dumps(called)), ("observation", "3"), ("gpt", "a")]
    row = {"conversations": [{"from": f, "value": v} for f, v in said], "tools": json.dumps([TOOL])}
    assert len(understand(row).examples) == 2


#: too deep, half a surrogate pair, no number: as JSON in a text
D, H, N = '{"a":' * 100 + "1" + "}" * 100, '{"a": "\\ud800"}', '{"a": NaN}'
BAD = [
    (7, "an object"),
    (None, "an object"),
    ([], "an object"),
    ({}, "no known form"),
    ({"x": 1}, "has the keys x"),
    ({"input": "a"}, "output: is missing"),
    ({"input": "a", "output": ""}, "output: must not be empty"),
    ({"input": "a", "output": 7}, "output: must be text"),
    ({"input": "a", "completion": "b"}, "input: is not a key beside prompt and completion"),
    ({"input": "a", "output": "b", "id": 1}, "id: is not a key beside input and output"),
    ({"text": None}, "text: must be text"),
    ({"text": "half a pair: \ud800"}, "surrogate"),
    ({"text": "a", "input": "b"}, "text: is not a key"),
    ({"instruction": "a", "output": "b", "text": "c"}, "text: is not a key beside instruction"),
    ({"messages": "a"}, "messages: must be a list"),
    ({"messages": []}, "at least two"),
    ({"messages": ["a", "b"]}, "messages.0: must be an object"),
    ({"messages": [ASKED]}, "at least two"),
    ({"messages": [ASKED, ASKED]}, "last message must be the assistant's"),
    ({"messages": [ASKED, {**ANSWER, "content": ""}]}, "not empty"),
    ({"messages": [{**ASKED, "role": "nobody"}, ANSWER]}, "messages.0.role"),
    ({"messages": [{**ASKED, "role": ["user"]}, ANSWER]}, "messages.0.role"),
    ({"messages": [{**ASKED, "content": None}, ANSWER]}, "messages.0: content is missing"),
    ({"messages": [{**ASKED, "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]}, "'image_url'"),
    ({"messages": [{**ASKED, "content": [{"type": "input_audio"}]}, ANSWER]}, "'input_audio'"),
    ({"messages": [ASKED, {**ANSWER, "audio": {"id": "x"}}]}, "messages.1.audio: is not a key"),
    ({"messages": [ASKED, {**ANSWER, "refusal": "no"}]}, "messages.1.refusal: is not a key"),
    ({"messages": [ASKED, {**ANSWER, "weight": 0.5}]}, "messages.1.weight"),
    ({"messages": [{**ASKED, "weight": 0}, ANSWER]}, "weight is for messages of the assistant"),
    ({"messages": [ASKED, {**ANSWER, "weight": 0}]}, "all have weight 0"),
    ({"messages": [ASKED, {**CALLING, "tool_calls": [{"type": "custom"}]}]}, "messages.1.tool_calls.0"),
    (
        {"messages": [ASKED, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "arguments: is no JSON",
    ),
    (
        {"messages": [ASKED, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": D}}]}]},
        "nested|recursion",
    ),
    ({"messages": [ASKED, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": H}}]}]}, "surrogate"),
    ({"messages": [ASKED, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": N}}]}]}, "nan is no JSON"),
    (
        {"messages": [ASKED, ANSWER], "tools": [{"function": {"name": "f", "parameters": {"a": [float("nan")]}}}]},
        "is no JSON|nan",
    ),
    ({"messages": [ASKED, ANSWER], "tools": [{"type": "web_search"}]}, "tools.0: a tool is"),
    ({"conversations": [{"from": "alien", "value": "q"}, {"from": "gpt", "value": "a"}]}, "'alien' is none of"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "human", "value": "a"}]}, "nothing is answered"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference rows"),
    ({"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}, "preference rows"),
]


@pytest.mark.parametrize(("row", "problem"), BAD, ids=repr)
def test_what_cannot_be_learnt_is_refused_by_name(row: Any, problem: str) -> None:
    """By a file's line as by an update: there is one way in."""
    with pytest.raises(InvalidRequest, match=problem):
        understand(row)
    with pytest.raises(RadianceError):
        parse_update(json.dumps({"examples": [row]}).encode())


texts = st.text(min_size=1).filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))
turns = st.lists(st.tuples(texts, texts, st.sampled_from([None, 0, 1]), st.booleans()), min_size=1, max_size=4)


@given(turns, st.booleans(), st.booleans())
def test_what_is_stored_or_sent_on_is_read_back_as_it_was(given_turns: Any, tools: bool, every: bool) -> None:
    """By the store and by another update."""
    chat: list[Any] = []
    for asked, answer, weight, calls in given_turns:
        chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, "weight": weight}]
        chat[-1] |= {"tool_calls": [CALL]} if tools and calls else {}
    row = {"messages": chat, **({"tools": [TOOL]} if tools else {})}
    try:
        examples = understand(row, every_answer=every).examples
    except InvalidRequest:
        assert all(weight == 0 for _, _, weight, _ in given_turns)
        return
    for example in examples:
        sent = json.loads(json.dumps(example.as_dict()))
        assert Example.from_dict(sent) == example
        assert understand(sent).examples == (example,)


# --- files -------------------------------------------------------------------------------------------


def rows(raw: bytes, name: str = "x.jsonl", encoding: str = "utf-8") -> list[tuple[str, Any]]:
    """(place, row or fault) of each."""
    source = read(io.BytesIO(raw), name, encoding=encoding)
    return [(row.place, row.fault or row.value) for row in source.rows]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n \n"])
def test_lines_keep_their_numbers(start: bytes) -> None:
    """Blank ones count, a byte order mark and Windows' line ends do not matter, nor do Unicode's own separators."""
    found = rows(start + '{"text": "a\u2028b"}\r\n\n{"text": "c"}'.encode())
    first = start.count(b"\n") + 1
    assert found == [(f"line {first}", {"text": "a\u2028b"}), (f"line {first + 2}", {"text": "c"})]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "stdin"])
@pytest.mark.parametrize(
    ("text", "count", "tags"),
    [
        ('[{"prompt": "a", "completion": "b"}, {"text": "c"}]', 2, []),
        ('{"examples": [{"text": "c"}], "tags": ["t"]}', 1, ["t"]),
        ('{\n"version": 1,\n"data": [{"text": "c"}]}', 1, []),
        ('{\n  "input": "a",\n  "output": "b"\n}', 1, []),
        ('{"messages": [{"role": "user", "content": "a"}]}', 1, []),
        ('{"text": "a"}\n{"text": "b"}', 2, []),
    ],
)
def test_json_is_a_list_an_object_with_one_inside_one_example_or_lines(
    name: str, text: str, count: int, tags: list[str]
) -> None:
    source = read(io.BytesIO(text.encode()), name)
    found = list(source.rows)
    assert (len(found), source.tags, [row.fault for row in found]) == (count, tags, [""] * count)
    assert bool(source.remarks) == ("version" in text)


@pytest.mark.parametrize(
    ("raw", "name", "fault"),
    [
        (b'{"text": "a"}\n{"text": "\xe9"}', "x.jsonl", ("line 2", "0xe9 at 10: save the file as UTF-8")),
        (b'{"text": "a"}\n{"te\0xt": 1}', "x.jsonl", ("line 2", "NUL byte")),
        (b'{"text": "a"}\n{"text": "a", "text": "b"}', "x.jsonl", ("line 2", "the key 'text' is there twice")),
        (b'{"text": "a"}\nnope', "x.jsonl", ("line 2", "not JSON: Expecting value at column 1")),
        (b'{"text": "a"}\n' + b"[" * 100_000, "x.jsonl", ("line 2", "not JSON")),
        (b'[{"text": "a"},\n{"text": }]', "x.json", ("line 2", "not JSON: Expecting value at column 10")),
        (b'[{"text": "\xe9"}]', "x.json", ("line 1", "0xe9")),
        (b"text,n\na,1\nb\n", "x.csv", ("line 3", "1 field, the header has 2")),
        (b"text,n\na,1\nb,1,2\n", "x.csv", ("line 3", "3 fields, the header has 2")),
        (b'text,n\n"a\nb",1\n"c\n\xe9",1\n', "x.csv", ("line 5", "0xe9")),
        (b'text,n\na,1\n"b"c,1\n', "x.csv", ("line 3", "no row of a table")),
        (b'text,n\na,1\n"b,1\nc,1\n', "x.csv", ("line 3", "no row of a table")),
    ],
)
def test_a_fault_is_that_of_its_line_and_the_others_are_read(raw: bytes, name: str, fault: tuple[str, str]) -> None:
    found = rows(raw, name)
    place, said = next((place, value) for place, value in found if isinstance(value, str))
    assert place == fault[0]
    assert fault[1] in said
    assert len([value for _, value in found if isinstance(value, str)]) == 1


@pytest.mark.parametrize(
    ("raw", "name", "encoding", "problem"),
    [
        ('{"text": "a"}'.encode("utf-16"), "x.jsonl", "utf-8", "is UTF-16"),
        (b"a,a\n1,2\n", "x.csv", "utf-8", "more than one column a"),
        (b",\n1,2\n", "x.csv", "utf-8", "header without names"),
        (b"\xe9,a\n1,2\n", "x.csv", "utf-8", "line 1: not UTF-8"),
        (b'{"text": "a"}', "x.jsonl", "klingon", "no encoding 'klingon'"),
        (b"\xd8\x00\xd8", "x.jsonl", "utf-16-be", "is not UTF-16-BE"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_says_so(raw: bytes, name: str, encoding: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        rows(raw, name, encoding)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_a_named_encoding_is_read(encoding: str) -> None:
    raw = '{"text": "é"}\n\n{"text": "ü"}\n'.encode(encoding)
    assert rows(raw, encoding=encoding) == [("line 1", {"text": "é"}), ("line 3", {"text": "ü"})]
    assert rows("text,n\né,1\n".encode(encoding), "x.csv", encoding) == [("line 2", {"text": "é", "n": "1"})]


@pytest.mark.parametrize(("mark", "name"), [(",", "x.csv"), (";", "x.csv"), ("\t", "x.csv"), ("\t", "x.tsv")])
def test_tables_have_commas_semicolons_or_tabs_and_quoted_line_ends(mark: str, name: str) -> None:
    text = f'n{mark}text\r\n1{mark}"a""b"\r\n\r\n2{mark}"c\nd"\r\n3{mark}e'
    found = rows(text.encode(), name)
    assert [(place, value["text"]) for place, value in found] == [
        ("line 2", 'a"b'),
        ("line 4", "c\nd"),
        ("line 6", "e"),
    ]


@given(
    st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(["csv", "json", "jsonl", "tsv"]),
)
def test_whatever_a_file_holds_is_rows_or_faults(raw: bytes, kind: str) -> None:
    """Nothing else comes out."""
    with contextlib.suppress(InvalidRequest):
        source = read(io.BytesIO(raw), "x", kind)
        for found in Intake(source):
            assert isinstance(found, Taken | Refused)


def test_a_file_in_memory_is_examples_or_names_its_bad_lines() -> None:
    """Of a chat every answer is learnt, if that is asked for."""
    good = b"\xef\xbb\xbf" + json.dumps({"messages": [ASKED, ANSWER, ASKED, ANSWER]}).encode() + b"\r\n\n"
    assert [len(examples_of_jsonl(good, every_answer=every)) for every in (True, None)] == [2, 1]
    with pytest.raises(InvalidRequest, match=r"line 3: not JSON.*; line 4: not UTF-8.*; line 5: output") as caught:
        examples_of_jsonl(good + b'{"a"\n{"text": "\xff"}\n{"input": "a"}\n')
    assert [fault["line"] for fault in caught.value.details] == [3, 4, 5]
    with pytest.raises(InvalidRequest, match="no line"):
        examples_of_jsonl(b"\n \n")


# --- columns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("question,answer,id", "input=question,output=answer"),
        ("Prompt,Completion", "input=Prompt,output=Completion"),
        ("prompt,response", "input=prompt,output=response"),
        ("instruction,input,output", "instruction=instruction,input=input,output=output"),
        ("instruction,context,response,category", "instruction=instruction,input=context,output=response"),
        ("messages,source", "messages=messages"),
        ("messages,tools", "messages=messages,tools=tools"),
        ("conversations,system", "conversations=conversations,system=system"),
        ("url,text", "text=text"),
    ],
)
def test_columns_are_found_by_their_usual_names(columns: str, expected: str) -> None:
    assert str(find_map(columns.split(","))) == expected


@pytest.mark.parametrize(
    ("columns", "problem", "hint"),
    [
        ("a,b", "No column is known by its name; there are: a, b", "--map input=question"),
        ("question,answer,text", "can be read in 2 ways", "--map input=question,output=answer or --map text=text"),
        ("input,output,messages", "can be read in 2 ways", "--map messages=messages"),
    ],
)
def test_columns_that_say_nothing_or_too_much_are_to_be_mapped(columns: str, problem: str, hint: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as caught:
        find_map(columns.split(","))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("input", "maps nothing known"),
        ("inputs=a,output=b", "'inputs=a' maps nothing"),
        ("input=a", "input needs output too"),
        ("input=a,input=b,output=c", "input is mapped twice"),
        ("text=a,output=b", "text does not go with output|output needs input|does not go with"),
        ("tools=a", "tools alone is no example"),
        ("", "an empty text"),
    ],
)
def test_a_map_that_makes_no_example_is_refused(text: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        parse_map([text])


def test_mapped_columns_may_have_commas_be_nested_and_hold_numbers() -> None:
    columns = parse_map(["input=a, b,output=c.d.1"])
    assert columns is not None
    assert columns.row({"a, b": 7, "c": {"d": ["x", True]}}) == {"input": "7", "output": "true"}
    with pytest.raises(InvalidRequest, match=r"there is no c\.d\.1; it has: a, b, c"):
        columns.row({"a, b": 7, "c": {}})


def test_a_chat_in_a_table_is_json() -> None:
    chat = json.dumps([ASKED, ANSWER]).replace('"', '""')
    raw = f'messages,n\n"{chat}",1\nx,2\n'
    taken, refused = Intake(read(io.BytesIO(raw.encode()), "x.csv"))
    assert isinstance(taken, Taken)
    assert taken.examples == (PAIR,)
    assert isinstance(refused, Refused)
    assert "line 3: messages: is no JSON" in str(refused)


def test_an_intake_counts_rows_by_format_and_stops_at_its_limit() -> None:
    raw = b'{"text": "a"}\n{"input": "q", "output": "a"}\nnope\n{"text": "b"}\n{"text": "c"}\n'
    intake = Intake(read(io.BytesIO(raw), "x.jsonl"), limit=4)
    assert len(list(intake)) == 4
    assert (intake.formats, intake.examples, [str(r)[:17] for r in intake.refused]) == (
        {"text": 2, "pairs": 1},
        3,
        ["line 3: not JSON:"],
    )


# --- how much it may become --------------------------------------------------------------------------


def sharegpt(answers: int, length: int = 1) -> dict[str, Any]:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a" * length}]
    return {"conversations": turns * answers}


@pytest.mark.parametrize(
    ("row", "problem"), [(sharegpt(1001), "1001 answers"), (sharegpt(500), "500 answers, each with all before it")]
)
def test_a_chat_of_very_many_answers_is_refused_and_not_made_into_examples(row: Any, problem: str) -> None:
    """Each would have all before it: kilobytes would become hundreds of megabytes. Its last answer alone may be had."""
    with pytest.raises(InvalidRequest, match=problem):
        understand(row)
    assert len(understand(row, every_answer=False).examples) == 1
    assert len(understand(sharegpt(300)).examples) == 300


def test_what_all_rows_of_an_update_or_a_file_become_is_bounded() -> None:
    """In characters, after chats became examples; rows of one answer each are bounded by the body alone."""
    rows: list[Any] = [sharegpt(20, 100)] * 4
    update = json.dumps({"examples": rows}).encode()
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    assert len(examples_of_jsonl(lines)) == len(parse_update(update)[0]) == 80
    for read_all in (
        lambda: parse_update(update, max_body_mb=0.02),
        lambda: examples_of_jsonl(lines, every_answer=True, max_body_mb=0.02),
    ):
        with pytest.raises(PayloadTooLarge, match=r"more than 0\.16 MB"):
            read_all()
    single = b'{"text":"a"}\n' * 2000
    assert len(examples_of_jsonl(single, max_body_mb=len(single) / 2**20)) == 2000


def test_a_file_and_an_update_have_100_000_examples_at_most() -> None:
    """Counted before any line is read, and after chats became examples."""
    with pytest.raises(PayloadTooLarge, match="more than 100,000"):
        examples_of_jsonl(b"\n{}\n" * 100_001)
    room = Room(1000)
    room.take([PAIR] * 100_000)
    with pytest.raises(PayloadTooLarge, match="more than 100,000"):
        room.take([PAIR])
