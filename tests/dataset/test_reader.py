"""Lines of every dialect are read alike; what cannot be used is refused with a reason and a place."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draft_model.dataset.reader import Rejected, parse, read_conversations
from draft_model.errors import DraftModelError

TURNS = [("system", "be short"), ("user", "hi"), ("assistant", "hello")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


def as_line(row) -> bytes:
    return json.dumps(row).encode()


SHAREGPT = {"user": "human", "assistant": "gpt"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": MESSAGES},
        {"id": 7, "messages": [message | {"weight": 1} for message in MESSAGES]},
        {"conversations": [{"from": SHAREGPT.get(role, role), "value": text} for role, text in TURNS]},
        {"conversations": [{"from": role, "value": text} for role, text in TURNS]},
        {"conversations": [{"role": role.replace("system", "developer"), "content": text} for role, text in TURNS]},
        {"system": "be short", "conversations": MESSAGES[1:]},
        {"conversations": None, "tools": [], "messages": [
            {"role": role, "content": [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]}
            for role, text in TURNS
        ]},
    ],
)  # fmt: skip
def test_dialects_are_read_alike(row):
    read = parse(as_line(row))
    assert (read.messages, read.cut, read.tools) == (MESSAGES, (False,), None)


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"tool_calls": {"name": "f", "arguments": {"a": 1}}, "content": ""},
        {"role": None, "from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    ],
)
@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_and_their_calls_are_read_from_objects_and_from_json_text(calls, tools):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", **calls},
        {"role": "tool", "content": "7", "tool_call_id": "x", "name": "f"},
        {"from": "observation", "value": ""},
        {"role": "assistant", "content": "it is 7", "reasoning": "so"},
    ]
    read = parse(as_line({"messages": messages, "tools": tools, "enable_thinking": True}))
    assert read.messages == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [CALL], "content": None},
        {"role": "tool", "content": "7", "tool_call_id": "x", "name": "f"},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "it is 7", "reasoning_content": "so"},
    ]
    assert read.tools == [{"name": "f"}]
    assert read.columns == {"enable_thinking": True}


def test_finish_length_says_that_an_answer_was_cut():
    messages = [
        {"role": "user", "content": "a", "finish": "length"},
        {"role": "assistant", "content": "b", "finish": "length"},
        {"role": "assistant", "content": "c", "finish": "stop"},
    ]
    assert parse(as_line({"messages": messages})).cut == (True, False)
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    assert parse(as_line({"messages": plain, "finish": ["length", "stop"]})).cut == (True, False)
    with pytest.raises(Rejected, match="1 entries for 2 assistant turns"):
        parse(as_line({"messages": plain, "finish": ["length"]}))


def test_nulls_that_arrow_fills_in_are_taken_out(tmp_path):
    from datasets import Dataset

    def row(name, **arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        properties = {key: {"type": "string", "enum": ["a", None]} for key in arguments}
        return {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
            "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}],
        }

    given = [
        row("weather", city="Ulm"),
        row("price", item="oak"),
        {"messages": [{"role": "assistant", "content": "a"}]},
    ]
    Dataset.from_list(given).to_json(tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines()
    assert b"null" in lines[0]
    for line, was in zip(lines, given, strict=True):
        read, expected = parse(line), parse(as_line(was))
        assert (read.messages, read.tools, read.columns) == (expected.messages, expected.tools, {})
    # What is written as text is the user's own.
    exact = json.dumps({"city": None})
    line = as_line({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": exact}]}]})
    assert parse(line).messages[0]["tool_calls"][0]["function"]["arguments"] == {"city": None}


def test_weights_of_zero_leave_an_answer_out():
    weights = [{"weight": 0}, {"train": False}, {"loss": 0.0}, {"weight": 1, "train": None}, {}, {"loss": True}]
    answers = [{"role": "assistant", "content": "a", **weight} for weight in weights]
    asked = {"role": "user", "content": "?", "weight": 0}
    assert parse(as_line({"messages": [asked, *answers]})).ignored == (True, True, True, False, False, False)


def test_prompts_are_read_as_the_training_data_is(tmp_path):
    ask = {"role": "user", "content": "a"}
    rows = [
        {"prompt": "a", "category": "x"},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": [ask], "prompt": None},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n\r\n".join(map(as_line, rows)))
    read = read_conversations(str(path))
    assert [row.messages for row in read] == [[ask]] * 4
    assert read[0].columns == {"category": "x"}
    assert len(read_conversations(str(path), 2)) == 2
    for bad in (b'{"prompt": "\\ud83d"}', b'{"prompt": [1]}', b'{"x": 1}', b"no"):
        path.write_bytes(as_line(rows[0]) + b"\n" + bad)
        with pytest.raises(DraftModelError, match=r"line 2 of .*prompts.jsonl is not a conversation: "):
            read_conversations(str(path))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("kind", [list, dict])
def test_a_file_that_is_one_document_is_told_as_such(tmp_path, indent, kind):
    rows = [{"messages": MESSAGES}] * 3
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(rows if kind is list else rows[0], indent=indent), encoding="utf-8")
    if kind is dict and not indent:
        assert len(read_conversations(str(path))) == 1
        return
    with pytest.raises(DraftModelError, match=r"a\.json: is one JSON document; give one conversation per line"):
        read_conversations(str(path))


@pytest.mark.parametrize(
    ("data", "kind"), [(b"PAR1\x15\x04", "Parquet"), ("{}".encode("utf-16"), "UTF-16 text"), (b"PK\x03\x04", "a zip")]
)
def test_a_file_of_another_format_is_told_as_such(tmp_path, data, kind):
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(DraftModelError, match=rf"a\.jsonl: is {kind}.*; give JSON lines in UTF-8"):
        read_conversations(str(tmp_path / "a.jsonl"))


def test_a_line_that_takes_all_memory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("draft_model.dataset.files.LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n' + "a" * 1001)
    with pytest.raises(DraftModelError, match=r"a\.jsonl: has a line of more than 0 MiB"):
        read_conversations(str(tmp_path / "a.jsonl"))


def messages(*pairs, **more):
    return as_line({"messages": [{"role": role, "content": content, **more} for role, content in pairs]})


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not UTF-8", "byte 44 of the line is 0xff"),
        (b'{"messages": [', "not JSON", "column"),
        (b"[" * 100_000, "not JSON", "recursion"),
        (b"[1, 2]", "wrong shape", "JSON list"),
        (as_line({"prompt": "a", "answer": "b"}), "wrong shape", "`prompt`, `answer`"),
        (as_line({"messages": "hello"}), "wrong shape", "must be a list"),
        (as_line({"messages": ["hello"]}), "wrong shape", "message 1 is not an object"),
        (as_line({"messages": [{"content": "a"}]}), "wrong shape", "message 1 has no `role`"),
        (messages(("user", "a"), ("assistant", 3)), "wrong shape", "message 2 has no `content`"),
        (messages(("user", "a"), ("assistant", None)), "wrong shape", "message 2 has no `content`"),
        (messages(("user", [{"type": "image_url", "image_url": "x"}])), "wrong shape", "content part"),
        (messages(("user", "a"), ("wizard", "b")), "unknown role", "message 2 has the role 'wizard'"),
        (as_line({"messages": []}), "empty", "the list"),
        (messages(("user", " \n"), ("assistant", "b")), "empty", "message 1 (user)"),
        (messages(("user", "a"), ("assistant", "")), "empty", "message 2 (assistant)"),
        (messages(("system", "a"), ("user", "b")), "no assistant turn", "system, user"),
        (messages(("user", "\ud83d"), ("assistant", "b")), "not Unicode", "message 1"),
        (messages(("assistant", "b"), reasoning_content=3), "wrong shape", "message 1"),
        (messages(("assistant", "b"), tool_calls=[{}]), "wrong shape", "message 1 has a tool call without the name"),
        (messages(("assistant", "b"), tool_calls="{"), "wrong shape", "message 1: its tool calls are no JSON"),
        (messages(("assistant", "b"), tool_calls=[{"name": "f", "arguments": "{"}]), "wrong shape", "arguments of f"),
        (as_line({"messages": [{"role": "assistant", "content": "a"}], "tools": "x"}), "wrong shape", "`tools`"),
        (as_line({"messages": [{"role": "assistant", "content": "a"}], "tools": [1]}), "wrong shape", "`tools`"),
        (as_line({"text": " "}), "empty", "`text`"),
        (messages(("assistant", "b"), weight=0.5), "wrong shape", "`weight` of an assistant message is 0.5"),
        (messages(("assistant", "b"), train="no"), "wrong shape", "`train` of an assistant message is 'no'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_a_reason(line, reason, detail):
    with pytest.raises(Rejected) as caught:
        parse(line)
    assert caught.value.reason == reason
    assert detail in caught.value.detail
    caught.value.detail.encode("utf-8")


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from("messages role from content value type text finish tools tool_calls".split()),  # noqa: SIM905
        inner | st.sampled_from(["user", "assistant", "text"]), max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@given(
    json_values.map(lambda value: {"messages": value} if isinstance(value, list) else value).map(as_line) | st.binary()
)
def test_no_line_does_worse_than_be_refused(line):
    try:
        row = parse(line)
    except Rejected as refusal:
        refusal.detail.encode("utf-8")  # it can be written to rejected.jsonl
    else:
        assert row.answers or row.text
