"""Lines of every dialect are read alike; what cannot be used is refused with a reason and a place."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draft_model.dataset.reader import Rejected, parse

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
