"""Random conversations with reasoning and tools: what is supervised is what the model wrote, by rules stated here."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_model.dataset.encode import Encoder, EncoderSettings

from .conftest import KINDS
from .test_encode import supervised_runs, texts

TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
WITH_TOOLS = ("qwen2", "qwen3", "qwen3-thinking", "llama3", "gpt-oss")
WITH_REASONING = ("qwen3", "qwen3-thinking", "deepseek", "gpt-oss")
TALKS_BESIDE_CALLS = ("qwen2", "qwen3", "qwen3-thinking")


@pytest.fixture(scope="module")
def encoders(models):
    return {kind: Encoder(EncoderSettings(models[kind], KINDS[kind][0], 100_000, 700)) for kind in WRITES}


def answer(draw, kind):
    reasons = kind in WITH_REASONING and draw(st.booleans())
    return {"role": "assistant", "content": draw(texts), **({"reasoning_content": draw(texts)} if reasons else {})}


@st.composite
def conversations(draw, kind):
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": draw(texts)})
        for _ in range(draw(st.integers(0, 2)) if kind in WITH_TOOLS else 0):
            call = {"type": "function", "function": {"name": "find", "arguments": {"it": draw(texts)}}}
            turn = answer(draw, kind) | {"tool_calls": [call]}
            if kind not in TALKS_BESIDE_CALLS or draw(st.booleans()):
                turn["content"] = None
            messages += [turn, {"role": "tool", "content": draw(texts)}]
        messages.append(answer(draw, kind))
    return messages


def arguments(turn):
    return [json.dumps(call["function"]["arguments"], ensure_ascii=False) for call in turn.get("tool_calls", ())]


def qwen(turn, thought=None, tag="<think>\n"):
    """`thought` is None where the template writes no block, empty where it writes an empty one."""
    calls = "".join(f'<tool_call>\n{{"name": "find", "arguments": {it}}}\n</tool_call>' for it in arguments(turn))
    content = turn["content"] or ""
    if thought is not None:
        content = content.lstrip("\n")
    block = tag + thought.strip("\n") + "\n</think>\n\n" if thought else ""
    return block + content + ("\n" if content and calls else "") + calls + "<|im_end|>"


def qwen3(turn, is_last, follows_question, tag="<think>\n"):
    thought = turn.get("reasoning_content", "")
    return qwen(turn, thought if follows_question and (is_last or thought) else None, tag)


def llama3(turn):
    call = "".join(f'{{"name": "find", "parameters": {it}}}' for it in arguments(turn))
    return (call or turn["content"].strip()) + "<|eot_id|>"


def deepseek(turn, is_last):
    thought = turn.get("reasoning_content") if is_last else None
    return (thought + "\n</think>\n\n" if thought else "") + turn["content"] + "<｜end▁of▁sentence｜>"


def gpt_oss(turn, is_last):
    for it in arguments(turn):  # an answer follows, so the reasoning before the call is gone
        return f" to=functions.find<|channel|>commentary json<|message|>{it}<|call|>"
    thought = turn.get("reasoning_content") if is_last else None
    channels = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    return f"{channels}<|channel|>final<|message|>{turn['content']}{'<|return|>' if is_last else '<|end|>'}"


WRITES = {  # of a turn, whether it is the last message, and whether no question comes after it
    "qwen2": lambda turn, *_: qwen(turn),
    "qwen3": qwen3,
    "qwen3-thinking": lambda *turn: qwen3(*turn, tag=""),  # the prompt had the tag
    "llama3": lambda turn, *_: llama3(turn),
    "deepseek": lambda turn, is_last, _: deepseek(turn, is_last),
    "gpt-oss": lambda turn, is_last, _: gpt_oss(turn, is_last),
}


def expected(kind, messages):
    asked = max(place for place, message in enumerate(messages) if message["role"] == "user")
    return [
        WRITES[kind](turn, place + 1 == len(messages), place > asked)
        for place, turn in enumerate(messages)
        if turn["role"] == "assistant"
    ]


@pytest.mark.parametrize("kind", WRITES)
@settings(max_examples=60)
@given(data=st.data())
def test_what_is_supervised_is_what_the_model_has_written(encoders, kind, data):
    messages = data.draw(conversations(kind))
    tools = {"tools": TOOLS} if kind in WITH_TOOLS else {}
    encoder = encoders[kind]
    encoded = encoder.encode([(1, json.dumps({"messages": messages, **tools}).encode())])
    assert not encoded.rejected, encoded.rejected
    found, whole = supervised_runs(encoder, encoded)
    assert found == expected(kind, messages)
    if kind == "gpt-oss" or (kind in WITH_REASONING and "reasoning_content" not in messages[-1]):
        return  # whose template writes an empty block, or the past, otherwise where it prompts
    assert whole.startswith(engine_prompt(encoder, messages[:-1], tools) + found[-1])


def engine_prompt(encoder, messages, tools):
    """What an engine gives the model before its turn."""
    past = [{**message, "content": message["content"] or ""} for message in messages]
    return encoder.tokenizer.apply_chat_template(
        past, chat_template=encoder.renderer.jinja, tokenize=False, add_generation_prompt=True, **tools
    )
