"""Lines of every dialect are read alike; what cannot be used is refused with a reason and a place."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draft_model.dataset.reader import Rejected, Turn, chunks, numbered_lines, parse
from draft_model.errors import DraftModelError

TURNS = [Turn("system", "be short"), Turn("user", "hi"), Turn("assistant", "hello")]


def as_line(row) -> bytes:
    return json.dumps(row).encode()


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"role": turn.role, "content": turn.content} for turn in TURNS]},
        {"id": 7, "messages": [{"role": turn.role, "content": turn.content, "weight": 1} for turn in TURNS]},
        {"conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(turn.role, turn.role), "value": turn.content}
            for turn in TURNS
        ]},
        {"conversations": [{"from": turn.role, "value": turn.content} for turn in TURNS]},
        {"conversations": None, "tools": [], "messages": [
            {"role": turn.role, "content": [
                {"type": "text", "text": turn.content[:1]}, {"type": "text", "text": turn.content[1:]}
            ]}
            for turn in TURNS
        ]},
    ],
)  # fmt: skip
def test_dialects_are_read_alike(row):
    assert parse(as_line(row)) == TURNS


def test_finish_length_says_that_an_answer_was_cut():
    messages = [
        {"role": "user", "content": "a", "finish": "length"},
        {"role": "assistant", "content": "b", "finish": "length"},
        {"role": "assistant", "content": "c", "finish": "stop"},
    ]
    assert [turn.cut for turn in parse(as_line({"messages": messages}))][1:] == [True, False]


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
        (messages(("assistant", "b"), reasoning_content="so"), "not supported", "`reasoning_content`"),
        (messages(("assistant", "b"), tool_calls=[{}]), "not supported", "`tool_calls`"),
        (as_line({"messages": [], "tools": [{"type": "function"}]}), "not supported", "`tools`"),
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
        st.sampled_from(["messages", "role", "from", "content", "value", "type", "text", "finish", "tools"]),
        inner | st.sampled_from(["user", "assistant", "text"]), max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@given(
    json_values.map(lambda value: {"messages": value} if isinstance(value, list) else value).map(as_line) | st.binary()
)
def test_no_line_does_worse_than_be_refused(line):
    try:
        turns = parse(line)
    except Rejected as refusal:
        refusal.detail.encode("utf-8")  # it can be written to rejected.jsonl
    else:
        assert any(turn.role == "assistant" for turn in turns)


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_bom_crlf_and_blank_lines_are_fine_and_lines_keep_their_numbers(tmp_path, name):
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": 2}\r\n{"a": 3}'
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    lines = [(number, json.loads(line)["a"]) for number, line in numbered_lines(path, name)]
    assert lines == [(1, 1), (4, 2), (5, 3)]


def test_damaged_gzip_names_the_parameter_and_what_to_give(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 10_000)[:-9])
    with pytest.raises(DraftModelError, match=r"dataset_train_split: here: is damaged gzip data .*\.jsonl\.gz"):
        list(numbered_lines(path, "dataset_train_split: here"))


@given(st.lists(st.sampled_from([1, 10, 3 << 20]), max_size=600))
def test_chunks_keep_all_lines_in_order_and_stay_small(sizes):
    buffer = bytes(max(sizes, default=0))
    lines = [(number, buffer[:size]) for number, size in enumerate(sizes)]
    made = list(chunks(lines))
    assert [line for chunk in made for line in chunk] == lines
    assert all(chunk and len(chunk) <= 256 for chunk in made)
    assert all(sum(len(line) for _, line in chunk[:-1]) < 4 << 20 for chunk in made)
