"""Conversations as the tokenizer's own chat template writes them, and the supervised characters of that text.

A chat template may leave out the reasoning of earlier turns, as an engine does. A row of which anything else is left
out or changed is refused: a mask over the rest would teach what nobody said.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from draft_model.dataset.reader import Message, Rejected, Row
from draft_model.dataset.templates import TEMPLATES, Span, Template, as_json, template_text
from draft_model.errors import DraftModelError

_OURS = {"messages", "tools", "add_generation_prompt", "continue_final_message", "strftime_now", "raise_exception"}
_NOT_WRITTEN = "not in the chat template"
_OPENED = re.compile(r"\A\s*<think>\n?")
_SHAPES = 4096
_FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template that is wrong, or meant to do harm, may raise besides Jinja's own errors."""


@dataclass(frozen=True)
class Rendered:
    """A conversation's text; positions are characters."""

    text: str
    supervised: list[tuple[int, int]]  # ranges [start, stop) that the model has written, in order
    borders: list[int]  # before which a token must end: where an answer begins, and where a cut one ends
    turns: int  # assistant turns


class Renderer:
    """Writes conversations as the target reads them, and finds the assistant's turns in them.

    With `tools`, by the tokenizer's template for conversations with tools, where it has another for them.
    """

    def __init__(self, tokenizer: Any, template: Template, *, tools: bool = False) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.jinja = template_text(tokenizer, template, tools=tools)
        self._columns = _variables(self.jinja) - _OURS - set(tokenizer.special_tokens_map)
        self._reasons = bool(re.search(r"\b(?:reasoning_content|thinking)\b", self.jinja))
        try:  # what the template writes after the header, before the model begins
            _, header, scaffold = self._write(_PROBE[:1], None, {}, ask=True).rpartition(template.header)
        except Rejected:
            header = scaffold = ""
        self._opens = bool(header and _OPENED.search(scaffold))
        self._turns = template.turns(scaffold if header else "")
        self._unwritten: dict[Any, int | None] = {}

    def render(self, row: Row) -> Rendered:
        """Writes one conversation, or raises Rejected: the template does not write all of it in turns."""
        text, spans = (row.text, self._spans_of_text(row.text)) if row.text else self._in_a_form(row)
        turns = list(zip(spans, _padded(row.cut, spans), _padded(row.ignored, spans), strict=True))
        ranges = [(span.start, span.end if cut else span.close) for span, cut, ignored in turns if not ignored]
        ends = [span.end for span, cut, ignored in turns if cut and not ignored]
        return Rendered(text, ranges, sorted([*(start for start, _ in ranges), *ends]), len(spans))

    def prompt(self, row: Row) -> str:
        """Writes what an engine gives the model: the conversation without its last answer, then the header."""
        if row.text:
            return row.text[: self._spans_of_text(row.text)[-1].start]
        messages = list(row.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise Rejected("empty", "there is nothing to reply to")
        return self._in_a_form(replace(row, messages=messages), ask=True)[0]

    def _in_a_form(self, row: Row, *, ask: bool = False) -> tuple[str, list[Span]]:
        """Writes the messages in the first form that the template takes; with `ask`, as a prompt without turns."""
        self.template.refuse_control_tokens(row)
        if self._reasons or self._opens:
            row = replace(row, messages=[_apart(message) for message in row.messages])
        if row.tools and not re.search(r"\btools\b", self.jinja):
            raise Rejected(_NOT_WRITTEN, "the row has `tools`, which this chat template does not write")
        columns = {name: value for name, value in row.columns.items() if name in self._columns}
        refusals: list[Rejected] = []
        for messages in _forms(row.messages):
            try:
                if ask:
                    plain = messages if self._reasons else _without_reasoning(messages)
                    text, spans = self._write(plain, row.tools, columns, ask=True), []
                else:
                    text = self.conversation(messages, row.tools, columns)
                    spans, answers = self.spans(text), row.answers
                    if len(spans) != len(answers):
                        found = f"{len(answers)} assistant turns given, {len(spans)} in what the chat template makes"
                        raise Rejected("assistant turns not found", f"{found} of them")
                    turns = zip(spans, answers, _padded(row.cut, spans), strict=True)
                    spans = [self._check_turn(text, row.messages, *turn) for turn in turns]
                self._check_messages(text, messages, row.tools, columns)
                return text, spans
            except Rejected as refusal:
                refusals.append(refusal)
        raise refusals[0]

    def conversation(
        self, messages: Sequence[Message], tools: Any = None, columns: Mapping[str, Any] | None = None
    ) -> str:
        """Returns the text of a conversation.

        A template may open the model's reasoning and write none, as that of DeepSeek-R1's distills does. The last turn
        is then put as the model has generated it; the reasoning of earlier turns is left out, as an engine does.
        """
        columns = columns or {}
        if self._reasons:
            return self._write(messages, tools, columns)
        plain = _without_reasoning(messages)
        if plain != list(messages) and not self._opens:
            raise Rejected(_NOT_WRITTEN, "`reasoning_content`, which this chat template does not write")
        if not (self._opens and (generated := _generated(messages[-1]))):
            return self._write(plain, tools, columns)
        prompt = self._write(plain[:-1], tools, columns, ask=True)
        return f"{prompt}{generated}{self.template.ends[0]}"

    def spans(self, text: str) -> list[Span]:
        """Finds the assistant turns of a rendered conversation, in order."""
        return [Span(m.start("content"), m.end("content"), m.end("end")) for m in self._turns.finditer(text)]

    def _spans_of_text(self, text: str) -> list[Span]:
        """The turns of text that was rendered elsewhere; the last one may lack its end."""
        spans = self.spans(text)
        if len(open_ended := self.spans(text + self.template.ends[0])) > len(spans):
            spans.append(Span(open_ended[-1].start, len(text), len(text)))
        if not spans:
            raise Rejected("no assistant turn", f"`text` has no {self.template.header!r}")
        return spans

    def _write(self, messages: Sequence[Message], tools: Any, columns: Mapping[str, Any], *, ask: bool = False) -> str:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._reasons:  # gpt-oss calls it by another name
            messages = [{**m, "thinking": m["reasoning_content"]} if "reasoning_content" in m else m for m in messages]
        given = {"tools": tools, "add_generation_prompt": ask, **self.tokenizer.special_tokens_map, **columns}
        try:
            # `apply_chat_template` calls this too, but leaves out a content of None, which some templates ask for.
            (text,), _ = render_jinja_template([messages], chat_template=self.jinja, **given)
            text.encode("utf-8")
        except (jinja2.TemplateError, *_FAULTS) as error:
            raise Rejected("refused by the chat template", str(error)) from None
        return str(text)

    def _check_turn(self, text: str, messages: list[Message], span: Span, index: int, is_cut: bool) -> Span:
        """Compares what a turn says with what is written of it; reasoning of earlier turns may be left out.

        The span of a turn that was cut while it reasoned ends before the closing tag, which is the template's.
        """
        message, turn = messages[index], text[span.start : span.end]
        content, reasoning = (message["content"] or "").strip(), message.get("reasoning_content", "").strip()
        if content not in turn:
            inline = _split_reasoning(content, opens=self._opens)
            if inline is None or inline[1] not in turn:
                raise _unwritten(index, "its text")
            reasoning, content = reasoning or inline[0], inline[1]
        calls = _functions(message)
        names = [call["name"] for call in calls]
        plain = turn.replace("\\", "")
        for call in calls:
            said = _strings(call["arguments"])
            if turn.count(call["name"]) < names.count(call["name"]) or not all(_is_in(one, plain) for one in said):
                raise _unwritten(index, f"its call of {call['name'][:40]}")
        if index + 1 == len(messages) and reasoning not in turn:
            raise _unwritten(index, "its reasoning")
        if is_cut and not content and not names and reasoning in turn:
            return replace(span, end=span.start + turn.rfind(reasoning) + len(reasoning))
        return span

    def _check_messages(self, text: str, messages: Sequence[Message], tools: Any, columns: Mapping[str, Any]) -> None:
        """Refuses messages of which the template writes nothing, or another text.

        A short message may be found by chance in another one. So the conversation is written once more with unique
        words for its messages: once for all conversations of the same shape, since that decides what is written.
        """
        shape = (bool(tools), *columns, *map(_shape, messages))
        if shape not in self._unwritten:
            if len(self._unwritten) >= _SHAPES:
                self._unwritten.clear()
            marked = [index for index, message in enumerate(messages) if _shape(message)[1] is False]
            probe = list(messages)
            for index in marked:
                probe[index] = {**messages[index], "content": f"unique{index}word"}
            try:
                written = self.conversation(probe, tools, columns)
            except Rejected:  # the template wants other contents than words
                marked = []
            self._unwritten[shape] = next((index for index in marked if f"unique{index}word" not in written), None)
        if (lost := self._unwritten[shape]) is not None:
            raise _unwritten(lost, "its text")
        for index, message in enumerate(messages):
            if message["role"] in ("system", "user") and message["content"].strip() not in text:
                raise _unwritten(index, "its text as it is")


def _padded(flags: Sequence[bool], spans: Sequence[Span]) -> list[bool]:
    """One flag for each turn: those of rendered text may have fewer or more."""
    return [*flags, *itertools.repeat(False, len(spans))][: len(spans)]


def _unwritten(index: int, what: str) -> Rejected:
    return Rejected(_NOT_WRITTEN, f"message {index + 1}: this chat template does not write {what}")


def _shape(message: Message) -> tuple[Any, ...]:
    """What decides whether a template writes a message: role, text (False: without tags), reasoning, calls."""
    text = message["content"] and (message["role"] == "assistant" and "think>" in message["content"])
    arguments = [type(function["arguments"]) for function in _functions(message)]
    return (message["role"], text, "reasoning_content" in message, *arguments)


def _functions(message: Message) -> list[dict[str, Any]]:
    return [call["function"] for call in message.get("tool_calls", ())]


def _strings(value: Any) -> Iterator[str]:
    """All texts and numbers of a call's arguments; of other values templates write `true` or `True`, null or None."""
    if isinstance(value, dict):
        yield from itertools.chain(value, *map(_strings, value.values()))
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_strings, value))
    elif not isinstance(value, bool) and value is not None:
        yield str(value)


def _is_in(text: str, plain: str) -> bool:
    """Whether a turn without backslashes has a text, as it is or in JSON."""
    forms = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return any(form.replace("\\", "").strip() in plain for form in forms)


def _variables(jinja: str) -> set[str]:
    """Names that a template reads from outside."""
    import jinja2
    from jinja2 import meta

    source = re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", jinja)  # a tag of transformers' own
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)  # noqa: S701 - renders nothing
    except (jinja2.TemplateError, RecursionError):
        return set()
    return set(meta.find_undeclared_variables(parsed))


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """A message of nothing but calls has an empty or no content, and arguments are objects or text, by template."""
    if not any("tool_calls" in message for message in messages):
        yield messages
        return
    for nothing, as_text in itertools.product(("", None), (False, True)):
        yield [_in_form(message, nothing, as_text) if "tool_calls" in message else message for message in messages]


def _in_form(message: Message, nothing: str | None, as_text: bool) -> Message:
    message = {**message, "content": nothing if message["content"] is None else message["content"]}
    if as_text:
        functions = [{**f, "arguments": as_json(f["arguments"])} for f in _functions(message)]
        calls = zip(message["tool_calls"], functions, strict=True)
        message["tool_calls"] = [{**call, "function": function} for call, function in calls]
    return message


def _without_reasoning(messages: Sequence[Message]) -> list[Message]:
    return [{name: value for name, value in m.items() if name != "reasoning_content"} for m in messages]


def _split_reasoning(content: str, *, opens: bool) -> tuple[str, str] | None:
    """Splits an answer as it was generated into reasoning and text; None where it has no reasoning.

    The prompt may have opened it; then the closing tag has to begin or end a line, for it may also be a word.
    """
    head, tag, answer = content.partition("</think>")
    if tag and (_OPENED.match(content) or (opens and (head.endswith("\n") or answer[:1] in ("", "\n")))):
        return _OPENED.sub("", head).strip(), answer.strip()
    return None


def _generated(message: Message) -> str:
    """What a model wrote whose prompt had opened its reasoning; empty where it did not reason."""
    content: str = message["content"] or ""
    if message["role"] != "assistant" or "tool_calls" in message:
        return ""
    if reasoning := message.get("reasoning_content"):
        return f"{reasoning}\n</think>\n\n{content}" if content else str(reasoning)
    return _OPENED.sub("", content) if _split_reasoning(content, opens=True) else ""


def _apart(message: Message) -> Message:
    """Moves reasoning that was cut off out of an answer's text: a template would write it as what was said."""
    content: str = message["content"] or ""
    if message["role"] != "assistant" or "</think>" in content or not _OPENED.search(content):
        return message
    return {**message, "content": "", "reasoning_content": _OPENED.sub("", content)}


_ANSWER = "probing answer"
_PROBE: list[Message] = [{"role": "user", "content": "probing question"}, {"role": "assistant", "content": _ANSWER}]


def check_fit(tokenizer: Any, template: Template) -> None:
    """Checks on a probe conversation that a tokenizer and the template that chat_template names belong together.

    Refused is a tokenizer that makes other tokens of a prompt alone than of prompt and answer, too: no mask over the
    whole would be what is served.
    """
    text, spans, fits = _probe(tokenizer, template)
    if fits:
        prompt = tokenizer(text[: spans[0].start], add_special_tokens=False)["input_ids"]
        if tokenizer(text, add_special_tokens=False)["input_ids"][: len(prompt)] != prompt:
            raise DraftModelError(f"model: its tokenizer makes other tokens of {text!r} than of its beginning alone")
        return
    fitting = [name for name, other in TEMPLATES.items() if _probe(tokenizer, other)[2]]
    advice = f"use {' or '.join(fitting)}" if fitting else f"none of {', '.join(TEMPLATES)} fits this model"
    lacks = ", ".join(_absent(tokenizer, template.control))
    found = f"the tokenizer has no chat template, and as tokens it lacks {lacks}"
    if tokenizer.chat_template:
        found = f"the tokenizer's own chat template writes {text[-160:]!r}"
    raise DraftModelError(
        f"chat_template: given {template.name!r}, whose assistant turns begin with {template.header!r}; "
        f"{found}: {advice}"
    )


def _probe(tokenizer: Any, template: Template) -> tuple[str, list[Span], bool]:
    """What the tokenizer's template makes of the probe, the turns in it, and whether the named template fits."""
    renderer = Renderer(tokenizer, template)
    try:
        text = renderer.conversation(_PROBE)
    except Rejected as refusal:
        return refusal.detail, [], False
    spans = renderer.spans(text)
    found = [text[span.start : span.end].strip() for span in spans]
    control = [token for token in template.control if token in text]
    return text, spans, found == [template.opening + _ANSWER] and not _absent(tokenizer, control)


def _absent(tokenizer: Any, control: Sequence[str]) -> list[str]:
    """The control tokens that the tokenizer would spell in pieces."""
    return [token for token in control if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1]
