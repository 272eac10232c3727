"""What becomes of tools, reasoning and faulty answers; the answers are written here, as targets generate them."""

import json

import pytest
from dataset.conftest import KINDS, models  # noqa: F401

from draft_model.dataset.encode import load_tokenizer
from draft_model.dataset.reader import parse
from draft_model.engine.generate import Answer
from draft_model.regenerate import conversation
from draft_model.regenerate.conversation import Outcome, WriterSettings, drive

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}]
SYSTEM = {"role": "system", "content": "Help."}
DIALOGUE = [
    SYSTEM,
    {"role": "user", "content": "Weather in Köln?"},
    {"role": "assistant", "tool_calls": CALL},
    {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    {"role": "assistant", "content": "The sun shines."},
]
TWO = [
    {"role": "user", "content": "one"}, {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"}, {"role": "assistant", "content": "second"},
]  # fmt: skip
CHANNELS = "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant"


@pytest.fixture(scope="module")
def converse(models):  # noqa: F811
    def converse(kind, answers, context=1000, **row):
        """The outcome and all prompts, where the target says these answers; `...` at an end: it was cut there."""
        settings, tokenizer = WriterSettings(models[kind], KINDS[kind][0], context, 50), load_tokenizer(models[kind])
        prompts, given, line = [], [], json.dumps(row).encode()
        while not isinstance(reached := conversation.converse(settings, line, "", "line-7", given), Outcome):
            prompts.append(tokenizer.decode(reached[0]))
            said = answers[len(given)]
            tokens = tokenizer(said.removesuffix("..."), add_special_tokens=False)["input_ids"]
            given.append(Answer(0, tokens, "length" if said.endswith("...") else "stop"))
        assert len(given) == len(answers), "the target was asked less often"
        return reached, prompts

    return converse


def said(outcome):
    return [m.get("content") for m in outcome.record["conversations"] if m["role"] == "assistant"]


@pytest.mark.parametrize(
    ("kind", "call", "last"),
    [
        ("qwen2", '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>', "Sun."),
        ("qwen3", '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>', "Sun."),
        ("llama3", '{"name": "weather", "parameters": {"city": "Köln"}}', "Sun."),
        (
            "gpt-oss",
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Köln"}',
            f"{CHANNELS}<|channel|>final<|message|>Sun.",
        ),
    ],
)
def test_a_tools_result_stays_where_the_target_makes_the_same_call(converse, kind, call, last):
    outcome, prompts = converse(kind, [call, last], messages=DIALOGUE, tools=TOOLS)
    assert [m["role"] for m in outcome.record["conversations"]] == [m["role"] for m in DIALOGUE]
    assert '"weather"' in prompts[0] or kind == "llama3", "the target reads the tools"
    assert call in prompts[1]
    assert "sunny" in prompts[1]
    assert (outcome.reason, said(outcome)[1], outcome.record["tools"]) == ("", "Sun.", TOOLS)
    assert parse(json.dumps(outcome.record).encode()).cut == (False, False)


@pytest.mark.parametrize("call", ["I do not know.", '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'])
def test_a_result_that_does_not_fit_ends_the_conversation_before_it(converse, call):
    outcome, _ = converse("qwen2", [call], messages=DIALOGUE, tools=TOOLS)
    assert (outcome.reason, said(outcome)) == ("tool results do not fit the answer", [call])
    assert outcome.record["conversations"][-1]["role"] == "assistant"


def test_reasoning_is_kept_and_not_read_again_by_later_turns(converse):
    outcome, prompts = converse("qwen3", ["<think>\nhm\n</think>\n\nyes", "no"], messages=TWO)
    assert said(outcome) == ["<think>\nhm\n</think>\n\nyes", "no"]
    assert "hm" not in prompts[1]
    outcome, prompts = converse("qwen3-thinking", ["hm\n</think>\n\nyes", "so\n</think>\n\nno"], messages=TWO)
    assert (len(said(outcome)), "hm" in prompts[1]) == (2, False)


@pytest.mark.parametrize(("kind", "answer"), [("qwen3", "<think>\nhm and so..."), ("qwen3-thinking", "hm and so...")])
def test_an_answer_that_is_cut_while_it_reasons_is_the_last(converse, kind, answer):
    outcome, _ = converse(kind, [answer], messages=TWO)
    assert (outcome.reason, outcome.record["finish"]) == ("cut while it reasoned", ["length"])
    assert "hm and so" in outcome.record["conversations"][-1]["reasoning_content"]


def test_turns_that_are_not_learnt_stay_as_they_were(converse):
    greeting = {"role": "assistant", "content": "Hello!"}
    rows = [greeting, TWO[0], {**TWO[1], "weight": 0}, *TWO[2:]]
    outcome, prompts = converse("qwen2", ["own"], messages=rows, id=5, source="x")
    assert said(outcome) == ["Hello!", "first", "own"]
    assert "first" in prompts[0]
    assert [m.get("weight") for m in outcome.record["conversations"] if m["role"] == "assistant"] == [0, 0, None]
    assert (outcome.kept, outcome.record["id"], outcome.record["source"]) == (2, 5, "x")


@pytest.mark.parametrize(
    ("answers", "reason", "kept"),
    [
        (["own", ""], "answer: empty", ["own"]),
        (["own", "no<|im_start|>"], "answer: control token", ["own"]),
        ([""], "answer: empty", None),
    ],
)
def test_a_faulty_answer_ends_the_conversation_before_its_question(converse, answers, reason, kept):
    outcome, _ = converse("qwen2", answers, messages=TWO)
    assert (outcome.reason, outcome.faulty) == (reason, False)
    assert (outcome.record and said(outcome)) == kept
    if kept:
        assert outcome.record["conversations"][-1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": DIALOGUE, "tools": TOOLS}, "not in the chat template"),
        ({"messages": TWO[:1]}, "no assistant turn"),
        ({"messages": [TWO[1]]}, "no assistant turn"),
    ],
)
def test_what_the_target_cannot_be_asked_is_a_fault_of_the_line(converse, row, reason):
    outcome, prompts = converse("qwen-bare", [], **row)
    assert (outcome.record, outcome.reason, outcome.faulty, prompts) == (None, reason, True, [])


def test_without_a_template_of_its_own_the_target_is_asked_as_chat_template_says(converse):
    outcome, (prompt,) = converse("qwen-bare", ["own"], messages=TWO[:2])
    assert prompt.endswith("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n")
    assert (outcome.reason, said(outcome)) == ("", ["own"])


def test_an_answer_has_what_the_context_leaves(converse):
    outcome, _ = converse(
        "qwen2", ["own"], context=60, messages=[*TWO[:2], {"role": "user", "content": "x y " * 60}, TWO[3]]
    )
    assert (outcome.reason, said(outcome), outcome.record["id"]) == ("prompt too long", ["own"], "line-7")


class Echo:
    """An engine that answers what came first."""

    in_flight, continuous = 5, True

    def __init__(self):
        self.waiting, self.most = [], 0

    def submit(self, request):
        self.waiting.append(request)
        self.most = max(self.most, len(self.waiting))

    def next(self):
        return Answer(self.waiting.pop(0).id, [], "stop")


@pytest.mark.parametrize(("share", "most"), [(3, 3), (9, 5)])
def test_an_engine_gets_what_it_takes_and_no_more_than_its_share(share, most):
    def reach(key, answers):
        return ([1], 8) if len(answers) < key % 3 else Outcome()

    engine = Echo()
    done = drive(engine, iter(range(20)), reach, lambda key, turn: 0, share)
    assert sorted(key for key, _ in done) == list(range(20))
    assert engine.most == most
