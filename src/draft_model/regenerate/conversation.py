"""One conversation: its assistant turns are replaced in order by what the target says, given its own earlier answers.

Where a conversation stands follows from its line and the answers so far, so any number of them can be under way with
one engine. Answers are kept as they were generated. Only gpt-oss's channels are taken apart, for no chat template
writes them as text.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, Union

from draft_model.dataset.encode import load_tokenizer
from draft_model.dataset.reader import Message, Rejected, Row, parse
from draft_model.dataset.render import Renderer
from draft_model.dataset.templates import TEMPLATES, as_json
from draft_model.engine.generate import Answer, Request

if TYPE_CHECKING:
    from draft_model.engine.generate import VllmGenerator
    from draft_model.regenerate.batched import BatchedGenerator

    Engine = VllmGenerator | BatchedGenerator
Key = TypeVar("Key")
Reached = Union[tuple[list[int], int], "Outcome"]
"""Where a conversation stands: the next prompt and how many tokens its answer may have, or what became of it."""

TOO_LONG = "prompt too long"
OTHER_CALLS = "tool results do not fit the answer"
IN_REASONING = "cut while it reasoned"
_ANSWER = "answer: "
_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


@dataclass(frozen=True)
class Turn:
    """An assistant turn before and after."""

    message: int  # its index
    before: str
    after: str
    tokens_before: int
    tokens: int
    finish: str  # stop or length


@dataclass(frozen=True)
class Outcome:
    """What became of a conversation."""

    record: dict[str, Any] | None = None  # a line of the output; None where it was put aside
    turns: list[Turn] = field(default_factory=list)  # those that were regenerated
    kept: int = 0  # assistant turns that were left as they were
    reason: str = ""  # why it was put aside, or ends early
    detail: str = ""
    faulty: bool = False  # it cannot be used, whatever the target says


class WriterSettings(NamedTuple):
    """All that shapes a `Writer`."""

    model: Path  # folder with the target's tokenizer files
    chat_template: str  # one of the names
    context: int  # tokens that prompt and answer may have together
    max_new_tokens: int  # of an answer


class Writer:
    """Makes prompts of conversations, and conversations of answers."""

    def __init__(self, settings: WriterSettings) -> None:
        self._settings, self._template = settings, TEMPLATES[settings.chat_template]
        self._tokenizer = load_tokenizer(settings.model)
        self._renderers = [Renderer(self._tokenizer, self._template, tools=tools) for tools in (False, True)]

    def regenerate(self, row: Row, suffix: str, number: str, answers: Sequence[Answer], turns: list[Turn]) -> Reached:
        """Where a row stands with these answers; adds the turns that they made, and raises what leaves it without."""
        renderer = self._renderers[bool(row.tools)]
        messages: list[Message] = []
        cut, ignored, end = list[bool](), list[bool](), Rejected("", "")
        try:
            flags = zip(row.cut, row.ignored, strict=True)
            for index, message in enumerate(row.messages):
                if message["role"] != "assistant":
                    messages.append(message)
                    continue
                was_cut, is_ignored = next(flags)
                if is_ignored or not messages or messages[-1]["role"] not in ("user", "tool"):
                    messages.append({**message, "weight": 0})  # nothing asks for it, or nobody learns it
                    cut.append(was_cut)
                    ignored.append(True)
                    continue
                here = f"message {index + 1}"
                text = renderer.prompt(replace(row, messages=messages))
                prompt = self._tokens(text)
                room = self._settings.context - len(prompt)
                if room < 1:
                    raise Rejected(TOO_LONG, f"{here}: {len(prompt)} tokens before it; {self._settings.context} fit")
                if len(turns) == len(answers):
                    return prompt, min(room, self._settings.max_new_tokens)
                answer = answers[len(turns)]
                said: str = self._tokenizer.decode(
                    answer.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
                if answer.finish == "length":  # within a character
                    said = said.rstrip("\N{REPLACEMENT CHARACTER}")
                try:
                    made = self._message(said, opened=text.rstrip().endswith("<think>"))
                except Rejected as refusal:
                    raise Rejected(f"{_ANSWER}{refusal.reason}", f"{here}: {refusal.detail}") from None
                before = _text(message)
                lengths = len(self._tokens(before)), len(answer.tokens)
                turns.append(Turn(len(messages), before, said, *lengths, answer.finish))
                messages.append(made)
                cut.append(answer.finish == "length")
                ignored.append(False)
                if index + 1 < len(row.messages) and not made["content"] and "tool_calls" not in made:
                    raise Rejected(IN_REASONING, f"{here}: {len(answer.tokens)} tokens")
                if index + 1 < len(row.messages) and _calls(made) != _calls(message):
                    raise Rejected(OTHER_CALLS, here)
        except Rejected as refusal:
            end = refusal
        if not turns:
            raise end if end.reason else Rejected("no assistant turn", "none of its assistant turns is learnt")
        while end.reason and messages[-1]["role"] != "assistant":
            messages.pop()
        renderer.render(replace(row, messages=messages, cut=tuple(cut), ignored=tuple(ignored)))  # as the data set will
        record = {"id": f"{row.columns.get('id', number)}{suffix}" if suffix else row.columns.get("id", number)}
        record |= {name: value for name, value in row.columns.items() if name != "id"}
        record |= {"tools": row.tools} if row.tools else {}
        record |= {"conversations": messages, "finish": ["length" if each else "stop" for each in cut]}
        return Outcome(record, turns, sum(ignored), end.reason, end.detail)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _message(self, said: str, *, opened: bool) -> Message:
        """An answer as a message, or Rejected; `opened`: the prompt ends where the model's reasoning begins."""
        message: Message = {"role": "assistant", "content": said}
        if self._template.opening:
            message = _of_channels(said)
        elif "</think>" not in said and (opened or said.lstrip().startswith("<think>")):  # cut while it reasoned
            message |= {"content": "", "reasoning_content": said.lstrip().removeprefix("<think>")}
        if not _text(message).strip():
            raise Rejected("empty", "the target ended its turn at once")
        self._template.refuse_control_tokens(Row([message]))
        return message


_writer = lru_cache(maxsize=1)(Writer)  # one a process


def converse(settings: WriterSettings, line: bytes, suffix: str, number: str, answers: Sequence[Answer]) -> Reached:
    """Where a line of the input stands with these answers; for a limited process: the chat template is a stranger's.

    A suffix is added to the line's id; `number` is the id of a line that has none.
    """
    turns: list[Turn] = []
    try:
        row = parse(line)
        if row.text:
            raise Rejected("rendered text", "`text` is one piece; give `conversations` or `messages`")
        return _writer(settings).regenerate(row, suffix, number, answers, turns)
    except RecursionError:
        return Outcome(reason="wrong shape", detail="the line is nested too deeply", faulty=True)
    except Rejected as refusal:
        faulty = not turns and not refusal.reason.startswith(_ANSWER)
        return Outcome(reason=refusal.reason, detail=refusal.detail, faulty=faulty)


def drive(
    engine: Engine, keys: Iterator[Key], reach: Callable[[Key, list[Answer]], Reached], seed: Callable[[Key, int], int],
    most: int,
) -> Iterator[tuple[Key, Outcome]]:  # fmt: skip
    """Has an engine answer conversations; yields each one's key with what became of it.

    `reach` says where a conversation stands with the answers so far; `seed` makes the seed of an answer's sampling from
    a key and the answer's number. The engine gets `most` at once, or its `in_flight` if that is less, so that engines
    share them.
    """
    active: dict[int, tuple[Key, list[Answer]]] = {}
    numbers = itertools.count()

    def advance(key: Key, answers: list[Answer]) -> Iterable[tuple[Key, Outcome]]:
        if isinstance(reached := reach(key, answers), Outcome):
            return [(key, reached)]
        active[number := next(numbers)] = key, answers
        engine.submit(Request(number, *reached, seed(key, len(answers))))
        return []

    while True:
        if engine.continuous or not active:
            started = list(itertools.islice(keys, min(most, engine.in_flight) - len(active)))
            for key in started:
                yield from advance(key, [])
            if not active and not started:
                return
        if active:
            answer = engine.next()
            key, answers = active.pop(answer.id)
            yield from advance(key, [*answers, answer])


def _of_channels(said: str) -> Message:
    """gpt-oss: reasoning, answer and call stand in channels of their own."""
    message: Message = {"role": "assistant", "content": ""}
    for part in said.split("<|start|>assistant"):
        head, _, body = part.partition("<|message|>")
        body = body.removesuffix("<|end|>")
        if recipient := _RECIPIENT.search(head):
            try:
                call = {"name": recipient[1], "arguments": json.loads(body)}
            except ValueError:
                raise Rejected("call is not JSON", f"{recipient[1]}: {body[:80]}") from None
            message = {**message, "content": None, "tool_calls": [{"type": "function", "function": call}]}
        elif "analysis" in head:
            message["reasoning_content"] = body
        else:
            message["content"] = body
    return message


def _calls(message: Message) -> list[tuple[str, Any]]:
    """Names and arguments of a turn's calls, also where they stand in its text as Qwen and Llama 3 write them."""
    if "tool_calls" in message:
        functions = [call["function"] for call in message["tool_calls"]]
        return [(function["name"], function["arguments"]) for function in functions]
    content = (message["content"] or "").removeprefix("<|python_tag|>").strip()
    found = []
    for text in _TOOL_CALL.findall(content) or ([content] if content.startswith("{") else []):
        try:
            call = json.loads(text)
        except ValueError:
            continue
        if "name" in call:
            found.append((call["name"], call.get("arguments", call.get("parameters"))))
    return found


def _text(message: Message) -> str:
    parts = (message.get("reasoning_content"), message["content"], as_json(message.get("tool_calls")))
    return "\n".join(part for part in parts if part)
