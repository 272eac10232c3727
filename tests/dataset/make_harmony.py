"""Writes harmony.json: random conversations as OpenAI's own library renders them, and what it says the model wrote.

    pip install openai-harmony==0.0.8
    python tests/dataset/make_harmony.py 30 > tests/dataset/harmony.json

The library downloads its vocabulary (3.6 MB) or finds it at TIKTOKEN_ENCODINGS_BASE, so tests read the file instead.
"""

from __future__ import annotations

import json
import random
import sys

from openai_harmony import (
    Author,
    Conversation,
    DeveloperContent,
    HarmonyEncodingName,
    Message,
    Role,
    SystemContent,
    ToolDescription,
    load_harmony_encoding,
)

ENCODING = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
WORDS = [
    "the", "answer", "is", "42", "\n", "\n\n", "  ", "<", "|>", "<|im_end|>", "<think>", "</s>", "{", '"', "Köln",
    "你好", "👍🏽", "to=functions.find", "assistant", "analysis", "def f(x):\n    return x", "...", "_",
]  # fmt: skip
TOOL = ToolDescription.new("find", "Finds it.", {"type": "object", "properties": {"it": {"type": "string"}}})


def text(draw: random.Random) -> str:
    return " ".join(["so", *draw.choices(WORDS, k=draw.randint(0, 8))])


def said(draw: random.Random, channel: str) -> Message:
    return Message.from_role_and_content(Role.ASSISTANT, text(draw)).with_channel(channel)


def generation(draw: random.Random, *, calls: bool) -> list[Message]:
    """What a model writes after one prompt: channels up to an answer or a call."""
    made = [said(draw, "analysis") for _ in range(draw.randint(0, 2))]
    if draw.random() < 0.3:
        made.append(said(draw, "commentary"))  # a preamble that the user reads
    if not calls:
        return [*made, said(draw, "final")]
    call = Message.from_role_and_content(Role.ASSISTANT, json.dumps({"it": text(draw)}, ensure_ascii=False))
    call = call.with_channel("commentary").with_recipient("functions.find")
    return [*made, call.with_content_type("<|constrain|>json") if draw.random() < 0.7 else call]


def conversation(draw: random.Random) -> list[Message]:
    messages = [Message.from_role_and_content(Role.SYSTEM, SystemContent.new())]
    if draw.random() < 0.7:
        developer = DeveloperContent.new().with_instructions(text(draw)).with_function_tools([TOOL])
        messages.append(Message.from_role_and_content(Role.DEVELOPER, developer))
    for _ in range(draw.randint(1, 3)):
        messages.append(Message.from_role_and_content(Role.USER, text(draw)))
        for _ in range(draw.choice([0, 0, 1, 2])):
            output = Message.from_author_and_content(Author.new(Role.TOOL, "functions.find"), text(draw))
            messages += generation(draw, calls=True)
            messages.append(output.with_channel("commentary").with_recipient("assistant"))
        messages += generation(draw, calls=False)
    return messages


def generated(messages: list[Message], whole: str) -> list[str]:
    """The parts of the text that follow a prompt; the library leaves earlier reasoning out of `whole`."""
    runs: list[str] = []
    at, follows = whole.index("<|start|>user<|message|>"), False
    dialogue = [message for message in messages if message.author.role not in (Role.SYSTEM, Role.DEVELOPER)]
    for message in dialogue:
        piece = ENCODING.decode(ENCODING.render(message))
        if message is dialogue[-1]:
            piece = piece.removesuffix("<|end|>") + "<|return|>"
        if not whole.startswith(piece, at):
            assert message.channel == "analysis", "only reasoning is left out"
            continue
        at += len(piece)
        is_answer = message.author.role == Role.ASSISTANT
        if is_answer:
            runs.append(
                (runs.pop() if follows else "") + (piece if follows else piece.removeprefix("<|start|>assistant"))
            )
        follows = is_answer
    assert at == len(whole)
    return runs


def main() -> None:
    """Prints the file."""
    draw = random.Random(0)
    made = []
    for _ in range(int(sys.argv[1])):
        messages = conversation(draw)
        tokens = ENCODING.render_conversation_for_training(Conversation.from_messages(messages))
        whole = ENCODING.decode(tokens)
        made.append({"text": whole, "generated": generated(messages, whole)})
    print(json.dumps(made, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
