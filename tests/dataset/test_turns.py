"""Tools, reasoning, channels, rendered text: what the model writes in a turn is supervised, all of it and no more."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from draft_model.dataset import build
from draft_model.dataset.encode import Encoder, EncoderSettings, load_tokenizer
from draft_model.dataset.reader import Rejected, parse
from draft_model.dataset.render import Renderer, check_fit
from draft_model.dataset.templates import TEMPLATES
from draft_model.errors import DraftModelError

from .conftest import KINDS, sentencepiece
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


QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
REASONED = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first", "reasoning_content": "why"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second", "reasoning_content": "how"},
]


def with_calls(*calls, **more):
    return [*DIALOGUE[:2], {"role": "assistant", "tool_calls": [*calls], **more}, *DIALOGUE[3:]]


def test_two_calls_of_one_turn_are_both_supervised(encode):
    call = 'function<｜tool▁sep｜>weather\n```json\n{"city": "Köln"}\n```<｜tool▁call▁end｜>'
    begin, end = "<｜tool▁call▁begin｜>", "<｜end▁of▁sentence｜>"
    assert encode("deepseek", messages=with_calls(*CALL, *CALL))[0] == [
        f"<｜tool▁calls▁begin｜>{begin}{call}\n{begin}{call}<｜tool▁calls▁end｜>{end}", f"The sun shines.{end}"
    ]  # fmt: skip
    for kind in ("qwen2", "qwen3"):
        found, _ = encode(kind, messages=with_calls(*CALL, *CALL, content="I look."), tools=TOOLS)
        assert found == [f"I look.\n{QWEN_CALL}\n{QWEN_CALL}<|im_end|>", "The sun shines.<|im_end|>"]


SAYS = "this chat template does not write its"
NO_TOOLS = "the row has `tools`, which this chat template does not write"


@pytest.mark.parametrize(
    ("kind", "row", "detail"),
    [
        ("qwen-bare", DIALOGUE, f"message 3: {SAYS} call of weather"),
        ("gpt-oss", with_calls(*CALL, *CALL), f"message 3: {SAYS} call of weather"),
        ("gpt-oss", with_calls(*CALL, content="I look."), f"message 3: {SAYS} text"),
        ("llama3", with_calls(*CALL, content="I look."), f"message 3: {SAYS} text"),
        ("llama3", with_calls(*CALL, *CALL), "only single calls at once"),
        ("deepseek", DIALOGUE, f"message 3: {SAYS} call of weather"),
        ("deepseek", with_calls(*CALL, *CALL, content="I look."), "its call of weather"),
        ("deepseek", {"messages": DIALOGUE[1:2] + DIALOGUE[4:], "tools": TOOLS}, NO_TOOLS),
        ("qwen-bare", {"messages": DIALOGUE[1:2] + DIALOGUE[4:], "tools": TOOLS}, NO_TOOLS),
        ("llama3", REASONED, "`reasoning_content`, which this chat template does not write"),
        ("qwen2", REASONED, "`reasoning_content`, which this chat template does not write"),
    ],
)
def test_what_the_template_would_drop_of_a_turn_is_a_reason_to_refuse(encode, kind, row, detail):
    reason, found = encode(kind, **(row if isinstance(row, dict) else {"messages": row}))
    assert detail in found
    assert reason in ("not in the chat template", "refused by the chat template")


ASK = {"role": "user", "content": "how?"}
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("kind", "messages", "learnt"),
    [
        # A closing tag is a word too: where a template cuts at it, what it leaves is not the answer.
        ("qwen3", [ASK, "Write </think> to close it."], None),
        ("qwen3", [ASK, "Write </think> to close it.", ASK, "done"], None),
        ("qwen3", [ASK, "<think>\nplan\n</think>\n\nThe tag </think> closes it."], None),
        ("qwen3", [ASK, "Here:\n```\n<think>plan</think>\n```\nDone.", ASK, "done"], None),
        ("qwen3-thinking", [ASK, "Write </think> to close it."], None),
        ("deepseek", [ASK, "Write </think> to close it."], None),
        ("deepseek", [ASK, "Write </think> to close it.", ASK, "done"], None),
        ("qwen2", [ASK, "Write </think> to close it."], ["Write </think> to close it.<|im_end|>"]),
        ("qwen3", [ASK, "<think>\nplan\n</think>\n\nSo."], ["<think>\nplan\n</think>\n\nSo.<|im_end|>"]),
        # Of several system messages some templates keep the first one, some the last.
        ("gpt-oss", ["s:First", ASK, "yes", "s:Second", ASK, "yes"], 4),
        ("deepseek", ["s:First", ASK, "yes", "s:Second", ASK, "yes"], 1),
        ("deepseek", ["s:yes", ASK, "yes", "s:First", ASK, "yes"], 1),  # its text is elsewhere in the conversation
    ],
)
def test_all_of_a_conversation_is_compared_with_what_is_written(encode, kind, messages, learnt):
    roles = {True: "system", False: "assistant"}
    row = [
        {"role": roles[m.startswith("s:")], "content": m.removeprefix("s:")} if isinstance(m, str) else m
        for m in messages
    ]
    if isinstance(learnt, list):
        assert encode(kind, messages=row)[0] == learnt
        return
    reason, detail = encode(kind, messages=row)
    assert reason == "not in the chat template"
    assert f"message {learnt or 2}: {SAYS} text" in detail


@pytest.mark.parametrize(
    ("before", "after", "messages", "detail"),
    [
        ("+ message.content + '<|im_end|>' ", "+ message.content | upper + '<|im_end|>' ", DIALOGUE, "text"),
        ("function.arguments | tojson", "function.arguments.keys() | list | tojson", DIALOGUE, "call of weather"),
        (r"+ message.content + '\n</tool_response>'", r"+ '\n</tool_response>'", DIALOGUE, "text"),
        ("a helpful assistant", "a thinking assistant", REASONED, "reasoning"),  # it only speaks of thinking
    ],
)
def test_what_a_template_drops_or_changes_is_found(models, tmp_path, before, after, messages, detail):
    model = tmp_path / "model"
    shutil.copytree(models["qwen2"], model)
    template = model / "chat_template.jinja"
    assert before in template.read_text()
    template.write_text(template.read_text().replace(before, after))
    line = json.dumps({"messages": messages}).encode()
    ((_, reason, found),) = Encoder(EncoderSettings(model, "qwen", 1000, 700)).encode([(1, line)]).rejected
    assert (reason, SAYS in found, detail in found) == ("not in the chat template", True, True)


def test_of_several_named_templates_the_one_for_tools_writes_tools(models, tmp_path):
    model, bare = tmp_path / "model", models["qwen-bare"]
    shutil.copytree(bare, model)
    shutil.copy(models["qwen3"] / "chat_template.jinja", model)
    tokenizer = load_tokenizer(model)
    whole = tokenizer.chat_template
    tokenizer.chat_template = {"default": TEMPLATES["qwen"].jinja, "tool_use": whole, "rag": "{{ documents }}"}
    tokenizer.save_pretrained(model)
    encoder = Encoder(EncoderSettings(model, "qwen", 1000, 700))
    check_fit(encoder.tokenizer, encoder.template)
    rows = [{"messages": DIALOGUE, "tools": TOOLS}, {"messages": DIALOGUE[1:2] + DIALOGUE[4:]}]
    encoded = encoder.encode([(n, json.dumps(row).encode()) for n, row in enumerate(rows)])
    assert not encoded.rejected
    text = encoder.tokenizer.decode(encoded.ids)
    assert "# Tools" in text
    assert "You are a helpful assistant." in text[len(text) // 2 :]
    del tokenizer.chat_template["default"]
    tokenizer.save_pretrained(model)
    shutil.rmtree(model / "additional_chat_templates", ignore_errors=True)
    for name in ("rag", "tool_use"):
        (model / "additional_chat_templates").mkdir(exist_ok=True)
        (model / "additional_chat_templates" / f"{name}.jinja").write_text(tokenizer.chat_template[name])
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(DraftModelError, match="chat templates rag, tool_use, but no `default`"):
        Encoder(EncoderSettings(model, "qwen", 1000, 700))


@pytest.mark.parametrize("style", ["legacy", "first", "always", "never"])
def test_tokens_are_those_of_the_whole_text_where_a_texts_start_gets_a_space(tmp_path, style):
    sentencepiece(style).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    encoder = Encoder(EncoderSettings(tmp_path, "qwen", 1000, 700))
    check_fit(encoder.tokenizer, encoder.template)
    turns = ["the fox", "lazy dog", "what", "\n brown  fox"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    encoded = encoder.encode([(1, json.dumps({"messages": messages}).encode())])
    whole = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    assert encoded.ids.tolist() == encoder.tokenizer(whole, add_special_tokens=False)["input_ids"]
    tokens = encoder.tokenizer.convert_ids_to_tokens(encoded.ids[encoded.mask].tolist())
    said = "".join(tokens).replace("<0x0A>", "\n").replace("▁", " ")
    assert said == "lazy dog<|im_end|>\n brown  fox<|im_end|>"


@pytest.mark.parametrize(
    ("row", "kind", "ends"),
    [
        ({"messages": DIALOGUE, "tools": TOOLS}, "qwen3", f"sunny\n</tool_response>{ANSWER}"),
        ({"messages": [ASK, {"role": "assistant", "content": "no"}]}, "qwen3-thinking", f"how?{ANSWER}<think>\n"),
        ({"prompt": "how?"}, "llama3", "how?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        ({"text": f"<|im_start|>user\na{ANSWER}b"}, "qwen2", f"a{ANSWER}"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "qwen2", None),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "qwen2", None),
    ],
)  # fmt: skip
def test_a_prompt_ends_where_the_last_answer_begins(models, row, kind, ends):
    renderer = Renderer(load_tokenizer(models[kind]), TEMPLATES[KINDS[kind][0]], tools="tools" in row)
    read = parse(json.dumps(row).encode(), needs_answer=False)
    if ends is None:
        with pytest.raises(Rejected, match=r"control token|nothing to reply to"):
            renderer.prompt(read)
        return
    prompt = renderer.prompt(read)
    assert prompt.endswith(ends)
    if read.answers:
        rendered = renderer.render(read)
        assert rendered.text[: rendered.supervised[-1][0]].startswith(prompt)


def test_an_answer_of_no_weight_is_not_supervised(encode):
    messages = [ASK, {"role": "assistant", "content": "one", "weight": 0}, ASK, {"role": "assistant", "content": "two"}]
    assert encode("qwen2", messages=messages)[0] == ["two<|im_end|>"]
    assert encode("qwen2", messages=messages[:2])[0] == "nothing supervised"


@pytest.mark.parametrize(
    ("kind", "first", "cut", "second"),
    [
        ("qwen3", "first<|im_end|>", "<think>\nhow", "\n</think>\n\nsecond<|im_end|>"),
        # The prompt opens the reasoning, so the tag is not the model's.
        ("qwen3-thinking", "first<|im_end|>", "how", "\n</think>\n\nsecond<|im_end|>"),
        ("deepseek", "first<｜end▁of▁sentence｜>", "how", "\n</think>\n\nsecond<｜end▁of▁sentence｜>"),
        ("gpt-oss", "<|channel|>final<|message|>first<|end|>", "<|channel|>analysis<|message|>how",
         "<|end|><|start|>assistant<|channel|>final<|message|>second<|return|>"),
    ],
)  # fmt: skip
def test_the_last_turns_reasoning_is_supervised_and_earlier_ones_are_dropped_as_the_engine_drops_them(
    encode, kind, first, cut, second
):
    found, whole = encode(kind, messages=REASONED)
    assert found == [first, cut + second]
    assert "why" not in whole
    for answer in ({"content": "", "reasoning_content": "how"}, {"content": "<think>\nhow"}):  # cut off, without an end
        messages = [*REASONED[:3], {"role": "assistant", "finish": "length", **answer}]
        assert encode(kind, messages=messages)[0] == [first, cut]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3-thinking", "llama3", "deepseek", "gpt-oss"])
def test_finish_length_has_no_end_of_turn_supervision(encode, kind):
    cut = {"role": "assistant", "content": "one two", "finish": "length"}
    whole = {**cut, "finish": "stop"}
    ends = TEMPLATES[KINDS[kind][0]].ends
    (first, last), _ = encode(kind, messages=[ASK, cut, ASK, cut])
    assert (first, last) == (first.removesuffix("two") + "two", last.removesuffix("two") + "two")
    (first, last), _ = encode(kind, messages=[ASK, cut, ASK, whole])
    assert first.endswith("two")
    assert last.endswith(("two" + ends[0], "two<|return|>"))
    call = {"role": "assistant", "tool_calls": CALL, "finish": "length"}
    if kind not in ("deepseek", "gpt-oss"):
        ((found, _), _) = encode(kind, messages=[*DIALOGUE[:2], call, *DIALOGUE[3:]], tools=TOOLS)
        assert "weather" in found
        assert not found.endswith(ends)


@pytest.mark.parametrize("opened", ["<think>\n", ""])
def test_reasoning_inside_the_text_is_as_good_as_reasoning_beside_it(encode, opened):
    inside = [
        {"role": m["role"], "content": f"{opened}{m['reasoning_content']}\n</think>\n\n{m['content']}"}
        if "reasoning_content" in m
        else m
        for m in REASONED
    ]
    found, whole = encode("deepseek", messages=inside)
    # What the template leaves of an earlier turn begins with the lines that stood after its reasoning.
    assert found == ["\n\nfirst<｜end▁of▁sentence｜>", "how\n</think>\n\nsecond<｜end▁of▁sentence｜>"]
    assert "why" not in whole
    assert encode("qwen3-thinking", messages=inside)[0] == ["first<|im_end|>", "how\n</think>\n\nsecond<|im_end|>"]


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
    """harmony.json is of openai-harmony 0.0.8, by make_harmony.py; `generated` is what follows its prompts."""
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


def test_what_becomes_of_the_same_lines_changes_only_with_the_format(encode):
    """Where this fails on purpose, raise build.FORMAT too: else data sets of before will be taken for today's."""
    rows = [
        {"messages": REASONED},
        {"messages": REASONED[:2], "finish": "length"},
        {"messages": DIALOGUE},
        {"messages": with_calls(*CALL, *CALL), "tools": TOOLS},
        {"messages": [*DIALOGUE[:2], {"role": "assistant", "content": " \n<think>\nwhy\n</think>\n\nYes \n 👍🏽 "}]},
        {"text": HARMONY[0]["text"]},
    ]
    kinds = [kind for kind in KINDS if kind != "smol-bare"]
    made = json.dumps([encode(kind, **row) for kind in kinds for row in rows], ensure_ascii=False)
    assert (build.FORMAT, hashlib.sha256(made.encode()).hexdigest()) == (
        4,
        "3d3fdb88e3699ff00cb3b3feb8307269cdb59078d2094e4e8d78a236dc471791",
    )
