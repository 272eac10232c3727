"""The mask is exact: decoded, the supervised tokens are the assistant's turns and their end tokens."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_model.dataset.encode import Encoder, EncoderSettings, encode_prompts, load_tokenizer
from draft_model.dataset.reader import Row
from draft_model.dataset.render import check_fit
from draft_model.dataset.templates import TEMPLATES
from draft_model.errors import DraftModelError

from .conftest import KINDS

# What the kinds' templates make of an answer's text, and the end of a turn that is (not) the last message.
WRITES = {
    "qwen": (str, "<|im_end|>", "<|im_end|>"),
    "llama3": (str.strip, "<|eot_id|>", "<|eot_id|>"),
    "deepseek-r1-distill": (str, "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gpt-oss": (lambda text: "<|channel|>final<|message|>" + text, "<|end|>", "<|return|>"),
}


@pytest.fixture(scope="module")
def encoders(models):
    def encoder(kind, max_length=100_000):
        return Encoder(EncoderSettings(models[kind], KINDS[kind][0], max_length, 600))

    made = {kind: encoder(kind) for kind in KINDS}
    made["make"] = encoder
    return made


def line(turns, **more):
    messages = [{"role": role, "content": text, **({"finish": "length"} if cut else {})} for role, text, cut in turns]
    return json.dumps({"conversations": messages, **more}).encode()


def supervised_runs(encoder, encoded):
    """The decoded runs of supervised tokens, and the decoded whole."""
    tokens = list(zip(encoded.ids.tolist(), encoded.mask.tolist(), strict=True))
    runs = [
        (supervised, encoder.tokenizer.decode([token for token, _ in run]))
        for supervised, run in itertools.groupby(tokens, key=lambda pair: pair[1])
    ]
    return [text for supervised, text in runs if supervised], "".join(text for _, text in runs)


def expected_runs(kind, turns):
    write, *ends = WRITES[KINDS[kind][0]]
    answers = [(text, cut, n == len(turns)) for n, (role, text, cut) in enumerate(turns, 1) if role == "assistant"]
    runs = [write(text) + ("" if cut else ends[is_last]) for text, cut, is_last in answers]
    return [run for run in runs if run]


words = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["\n", "\n\n", " ", "   ", "\t", "the answer", "<", "|>", "im_start", "👍🏽", "e\u0301", "\u200b"]),
)
# Hypothesis draws constants of the code too; what `</think>` does is in test_turns.py.
control = ["</think>", *(token for template in TEMPLATES.values() for token in template.control)]
texts = (
    st.lists(words, min_size=1, max_size=6)
    .map("".join)
    .filter(lambda text: text.strip() and not any(token in text for token in control))
)


@st.composite
def conversations(draw):
    turns = [("system", draw(texts), False)] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [("user", draw(texts), False), ("assistant", draw(texts), draw(st.booleans()))]
    if draw(st.booleans()):
        turns.append(("user", draw(texts), False))
    return turns


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("qwen3")])  # see test_random_turns.py
@settings(max_examples=60)
@given(turns=conversations())
def test_supervised_tokens_are_the_answers_and_their_ends(encoders, kind, turns):
    encoder = encoders[kind]
    encoded = encoder.encode([(1, line(turns))])
    if not (expected := expected_runs(kind, turns)):
        assert [reason for _, reason, _ in encoded.rejected] == ["nothing supervised"]
        return
    assert not encoded.rejected
    found, whole = supervised_runs(encoder, encoded)
    assert found == expected
    messages = [{"role": role, "content": text} for role, text, _ in turns]
    assert whole == encoder.tokenizer.apply_chat_template(
        messages, tokenize=False, chat_template=encoder.renderer.jinja
    )


anything = st.binary(max_size=30) | st.sampled_from([b"{}", b'{"text": "?"}', b'{"messages": [{"role": "user"}]}'])


@settings(max_examples=60)
@given(lines=st.lists(conversations().map(line) | anything, max_size=8))
def test_every_line_is_kept_or_rejected_and_none_is_both(encoders, lines):
    encoded = encoders["qwen2"].encode(list(enumerate(lines, start=1)))
    rejected = [number for number, _, _ in encoded.rejected]
    assert sorted(encoded.numbers.tolist() + rejected) == list(range(1, len(lines) + 1))
    assert len(encoded.ids) == len(encoded.mask) == encoded.lengths.sum()
    assert len(encoded.lengths) == len(encoded.turns) == len(encoded.numbers)


def test_a_token_never_spans_header_and_answer(encoders):
    encoder = encoders["qwen2"]
    joined = encoder.tokenizer.tokenize("<|im_start|>assistant\n\n\nthe answer")
    assert "ĊĊĊ" in joined, "else this test shows nothing"
    encoded = encoder.encode([(1, line([("user", "?", False), ("assistant", "\n\nthe answer", False)]))])
    assert supervised_runs(encoder, encoded)[0] == ["\n\nthe answer<|im_end|>"]
    first = int(np.flatnonzero(encoded.mask)[0])
    prompt = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], add_generation_prompt=True, chat_template=encoder.renderer.jinja
    )["input_ids"]
    assert encoded.ids[:first].tolist() == prompt, "the draft is trained on the prompts that it will serve"


@pytest.mark.parametrize(
    ("kind", "date"), [("llama3", "Today Date: 26 Jul 2024"), ("gpt-oss", "Current date: 2024-07-26")]
)
def test_the_date_that_a_template_writes_is_always_the_same(encoders, kind, date):
    encoder = encoders[kind]
    _, whole = supervised_runs(encoder, encoder.encode([(1, line([("user", "?", False), ("assistant", "!", False)]))]))
    assert date in whole


def test_long_conversations_are_cut_at_the_end_and_counted(encoders):
    turns = [("user", "the question", False), ("assistant", "the answer " * 30, False)]
    whole = encoders["qwen2"].encode([(1, line(turns))])
    length = len(whole.ids) - 7
    for limit, cut in ((length + 7, 0), (length, 1)):
        encoded = encoders["make"]("qwen2", limit).encode([(1, line(turns))])
        assert encoded.truncated == cut
        assert encoded.ids.tolist() == whole.ids[:limit].tolist()
        assert encoded.mask.tolist() == whole.mask[:limit].tolist()
    prompt = int(np.flatnonzero(whole.mask)[0])
    lines = [(1, line(turns)), (2, line([*turns[:1], ("assistant", "x", False)]))]
    gone = encoders["make"]("qwen2", prompt).encode(lines)
    assert [(n, reason) for n, reason, _ in gone.rejected] == [(n, "nothing supervised") for n in (1, 2)]
    assert gone.truncated == 0


@pytest.mark.parametrize(
    ("kind", "token"),
    [("qwen2", "<|im_end|>"), ("llama3", "<|start_header_id|>"), ("deepseek", "<｜Assistant｜>"),
     ("gpt-oss", "<|channel|>")],
)  # fmt: skip
@pytest.mark.parametrize("speaker", [0, 1])
def test_messages_with_control_tokens_are_refused(encoders, kind, token, speaker):
    turns = [["user", "question", False], ["assistant", "answer", False]]
    turns[speaker][1] += f" and {token} inside"
    encoded = encoders[kind].encode([(7, line(turns))])
    ((number, reason, detail),) = encoded.rejected
    assert (number, reason) == (7, "control token")
    assert token in detail
    assert f"message {speaker + 1}" in detail


def test_a_template_that_hides_or_refuses_turns_is_noticed(models):
    encoder = Encoder(EncoderSettings(models["qwen2"], "qwen", 100, 600))
    encoder.renderer.jinja = (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        "{% if m.role != 'assistant' or loop.last %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}"
    )
    dialogue = [("user", "a", False), ("assistant", "b", False)]
    encoded = encoder.encode(
        [(1, line(dialogue)), (2, line([("system", "s", False), *dialogue])), (3, line(dialogue * 2))]
    )
    assert encoded.numbers.tolist() == [1]
    assert [(number, reason) for number, reason, _ in encoded.rejected] == [
        (2, "refused by the chat template"), (3, "assistant turns not found")
    ]  # fmt: skip
    assert "no system role here" in encoded.rejected[0][2]


@pytest.mark.parametrize(
    "fault",
    ["{{ 1 / 0 }}", "{{ 10**400 * 1.0 }}", "{{ '%(x)s' % {} }}", "{{ 1 | dictsort }}",
     f"{{{{ {'(' * 3000}1{')' * 3000} }}}}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"],
)  # fmt: skip
def test_whatever_a_template_raises_is_a_reason(models, fault):
    tokenizer = load_tokenizer(models["qwen2"])
    tokenizer.chat_template = fault
    with pytest.raises(DraftModelError, match="chat_template: given 'qwen'"):
        check_fit(tokenizer, TEMPLATES["qwen"])
    row = Row([{"role": "user", "content": "a"}])
    assert encode_prompts(tokenizer, "qwen", [row])[0].startswith("refused by the chat template: ")


def test_a_line_that_is_nested_too_deeply_is_rejected(encoders):
    deep = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"a": '
    encoded = encoders["qwen2"].encode([(1, deep + b"[" * 900 + b"]" * 900 + b"}]}")])
    assert [reason for _, reason, _ in encoded.rejected] in (["wrong shape"], ["not JSON"])


def test_tokens_beyond_the_embedding_are_refused(models, encoders):
    tokenizer = encoders["qwen2"].tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    encoder = Encoder(EncoderSettings(models["qwen2"], "qwen", 100, end))
    encoded = encoder.encode([(1, line([("user", "a", False), ("assistant", "b", False)]))])
    assert [(n, reason) for n, reason, _ in encoded.rejected] == [(1, "token outside the vocabulary")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_name_that_does_not_fit_the_tokenizer_is_refused_by_name(encoders, kind, name):
    right = KINDS[kind][0]
    tokenizer = encoders[kind].tokenizer
    if name == right:
        check_fit(tokenizer, TEMPLATES[name])
        return
    with pytest.raises(DraftModelError) as caught:
        check_fit(tokenizer, TEMPLATES[name])
    message = str(caught.value)
    assert f"chat_template: given {name!r}" in message
    assert repr(TEMPLATES[name].header) in message
    assert f"use {right}" in message


def test_a_template_of_none_of_the_four_kinds_is_refused_with_what_it_writes(models):
    tokenizer = load_tokenizer(models["qwen2"])
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    with pytest.raises(DraftModelError, match=r"none of llama3, qwen, gpt-oss, deepseek-r1-distill") as caught:
        check_fit(tokenizer, TEMPLATES["qwen"])
    assert "[assistant] probing answer" in str(caught.value)
