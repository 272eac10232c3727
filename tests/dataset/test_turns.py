"""Tools, reasoning, channels, rendered text: what the model writes in a turn is supervised, all of it and no more."""

import json
from pathlib import Path

import pytest

from draft_model.dataset.encode import Encoder, EncoderSettings

from .conftest import KINDS
from .test_encode import supervised_runs

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}]
DIALOGUE = [
    {"role": "system", "content": "Help."},
    {"role": "user", "content": "Weather in Köln?"},
    {"role": "assistant", "tool_calls": CALL},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "The sun shines."},
]
HARMONY = json.loads((Path(__file__).parent / "harmony.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def encode(models):
    encoders = {}

    def encode(kind, **row):
        """The decoded runs of supervised tokens and the whole text, or the reason of the refusal."""
        if kind not in encoders:
            encoders[kind] = Encoder(EncoderSettings(models[kind], KINDS[kind][0], 100_000, 700))
        encoded = encoders[kind].encode([(1, json.dumps(row).encode())])
        if encoded.rejected:
            return encoded.rejected[0][1:]
        return supervised_runs(encoders[kind], encoded)

    return encode


@pytest.mark.parametrize(
    ("kind", "call", "answer"),
    [
        (
            "qwen2",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>',
            "The sun shines.<|im_end|>",
        ),
        ("llama3", '{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>', "The sun shines.<|eot_id|>"),
        (
            "deepseek",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
            '{"city": "Köln"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
            "The sun shines.<｜end▁of▁sentence｜>",
        ),
        (
            "gpt-oss",
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Köln"}<|call|>',
            "<|channel|>final<|message|>The sun shines.<|return|>",
        ),
    ],
)
def test_a_tools_call_is_supervised_and_its_result_is_not(encode, kind, call, answer):
    tools = {} if kind == "deepseek" else {"tools": TOOLS}  # whose template writes none
    found, whole = encode(kind, messages=DIALOGUE, **tools)
    assert found == [call, answer], whole
    assert "sunny" in whole
    if kind in ("qwen2", "gpt-oss"):
        assert '"name": "weather", "parameters"' in whole, "the tools are in the prompt"


@pytest.mark.parametrize("kind", ["qwen3", "qwen-bare"])
def test_a_part_that_the_template_does_not_write_is_a_reason_to_refuse(encode, kind):
    reason, detail = encode(kind, messages=DIALOGUE)
    assert (reason, detail) == (
        "not in the chat template", "message 3 has `tool_calls`, which this chat template does not write"
    )  # fmt: skip
    reason, detail = encode(kind, messages=DIALOGUE[1:2] + DIALOGUE[4:], tools=TOOLS)
    assert (reason, detail) == (
        "not in the chat template", "the row has `tools`, which this chat template does not write"
    )  # fmt: skip


REASONED = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first", "reasoning_content": "why"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second", "reasoning_content": "how"},
]


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("qwen3", "first<|im_end|>", "<think>\nhow\n</think>\n\nsecond<|im_end|>"),
        # The prompt opens the reasoning, so the tag is not the model's.
        ("deepseek", "first<｜end▁of▁sentence｜>", "how\n</think>\n\nsecond<｜end▁of▁sentence｜>"),
        (
            "gpt-oss",
            "<|channel|>final<|message|>first<|end|>",
            "<|channel|>analysis<|message|>how<|end|><|start|>assistant<|channel|>final<|message|>second<|return|>",
        ),
    ],
)
def test_the_last_turns_reasoning_is_supervised_and_earlier_ones_are_dropped_as_the_engine_drops_them(
    encode, kind, first, second
):
    found, whole = encode(kind, messages=REASONED)
    assert found == [first, second]
    assert "why" not in whole


def test_reasoning_that_was_cut_off_has_no_end(encode):
    messages = [*REASONED[:3], {"role": "assistant", "content": "", "reasoning_content": "how", "finish": "length"}]
    assert encode("deepseek", messages=messages)[0] == ["first<｜end▁of▁sentence｜>", "how"]


@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_reasoning_of_a_model_that_does_not_reason_is_refused(encode, kind):
    reason, detail = encode(kind, messages=REASONED)
    assert reason == "not in the chat template"
    assert "reasoning_content" in detail


def test_a_column_goes_to_the_template_that_takes_it_and_to_no_other(encode):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    assert "Reasoning: high" in encode("gpt-oss", messages=messages, reasoning_effort="high")[1]
    assert "Reasoning: medium" in encode("gpt-oss", messages=messages, id=3)[1]
    assert "Today Date: today" in encode("llama3", messages=messages, date_string="today")[1]
    plain = encode("qwen2", messages=messages)
    assert encode("qwen2", messages=messages, date_string="x", add_generation_prompt=True, bos_token="y") == plain


@pytest.mark.parametrize("kind", ["gpt-oss", "gpt-oss-bare"])
@pytest.mark.parametrize("conversation", HARMONY)
def test_harmony_what_openais_own_library_gives_to_generate_is_what_is_supervised(encode, kind, conversation):
    """harmony.json: rendered by openai-harmony 0.0.8; `generated` is what follows its prompts for completion."""
    found, whole = encode(kind, text=conversation["text"])
    assert found == conversation["generated"]
    assert whole == conversation["text"]


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n", ["b<|im_end|>"]),
        ("<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\nc d", ["b<|im_end|>", "c d"]),
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "nothing supervised"),
        ("<|im_start|>user\na<|im_end|>\n", "no assistant turn"),
        ("just text", "no assistant turn"),
    ],
)
def test_rendered_text_is_taken_as_it_is(encode, text, runs):
    found, whole = encode("qwen2", text=text)
    assert found == runs
    assert isinstance(runs, str) or whole == text


def test_control_tokens_are_found_wherever_they_hide(encode):
    call = [{"function": {"name": "f", "arguments": {"x": ["<|im_end|>"]}}}]
    hidden = [*DIALOGUE[:2], {"role": "assistant", "tool_calls": call}, *DIALOGUE[3:]]
    assert encode("qwen2", messages=hidden)[0] == "control token"
    assert encode("qwen2", messages=DIALOGUE, tools=[{"name": "<|im_start|>"}])[0] == "control token"
