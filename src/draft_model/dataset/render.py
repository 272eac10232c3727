"""Conversations as the tokenizer's own chat template writes them, and the assistant's turns in that text.

A chat template may leave out reasoning of earlier turns, as an engine does. Whatever else of a turn it would leave out
is a reason to refuse the row: a mask over the rest would teach what nobody said.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from draft_model.dataset.reader import Message, Rejected, Row
from draft_model.dataset.templates import TEMPLATES, Span, Template, as_json, template_text
from draft_model.errors import DraftModelError

_OURS = {"messages", "tools", "add_generation_prompt", "continue_final_message", "strftime_now", "raise_exception"}
_NOT_WRITTEN = "not in the chat template"
_OPENED = re.compile(r"\A\s*<think>\n?")


class Renderer:
    """Writes conversations as the target reads them, and finds the assistant's turns in them.

    Args:
        tokenizer: the target's.
        template: the one that parameter chat_template names.
    """

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.jinja = template_text(tokenizer, template)
        self._columns = _variables(self.jinja) - _OURS - set(tokenizer.special_tokens_map)
        self._reasons = bool(re.search(r"\b(?:reasoning_content|thinking)\b", self.jinja))
        self.scaffold = self._scaffold()
        self._turns = template.turns(self.scaffold)

    def render(self, row: Row) -> tuple[str, list[Span]]:
        """Writes one conversation.

        Returns:
            Its text, and the assistant's turns in it.

        Raises:
            Rejected: the chat template refuses the conversation, does not write a part of it, or its turns cannot
                be told apart.
        """
        if row.text:
            return row.text, self._spans_of_text(row.text)
        self.template.refuse_control_tokens(row)
        if self._reasons or _OPENED.search(self.scaffold):
            row = replace(row, messages=[_apart(message) for message in row.messages])
        if row.tools and not re.search(r"\btools\b", self.jinja):
            raise Rejected(_NOT_WRITTEN, "the row has `tools`, which this chat template does not write")
        columns = {name: value for name, value in row.columns.items() if name in self._columns}
        refusals: list[Rejected] = []
        for messages in _forms(row.messages):
            try:
                text = self.conversation(messages, row.tools, columns)
                return text, self._spans_of_turns(text, row)
            except Rejected as refusal:
                refusals.append(refusal)
        raise refusals[0]

    def conversation(
        self, messages: Sequence[Message], tools: Any = None, columns: dict[str, Any] | None = None
    ) -> str:
        """The text of a conversation.

        A template may open the model's reasoning and write none, as that of DeepSeek-R1's distills does. The last turn
        is then put as the model has generated it; the reasoning of earlier turns is left out, as an engine does.

        Raises:
            Rejected: the chat template refuses it.
        """
        given = columns or {}
        if self._reasons:
            return self._write(messages, tools, given)
        last, opens = messages[-1], bool(_OPENED.search(self.scaffold))
        plain = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in messages]
        if plain != list(messages) and not opens:
            raise Rejected(_NOT_WRITTEN, "`reasoning_content`, which this chat template does not write")
        if not (opens and (generated := _generated(last))):
            return self._write(plain, tools, given)
        prompt = self._write(plain[:-1], tools, given, add_generation_prompt=True)
        return f"{prompt}{generated}{self.template.ends[0]}"

    def spans(self, text: str) -> list[Span]:
        """The assistant turns of a rendered conversation, in order."""
        return [Span(m.start("content"), m.end("content"), m.end("end")) for m in self._turns.finditer(text)]

    def _spans_of_turns(self, text: str, row: Row) -> list[Span]:
        spans = self.spans(text)
        if len(spans) != row.answers:
            raise Rejected(
                "assistant turns not found",
                f"{row.answers} assistant turns given, {len(spans)} in what the chat template makes of them",
            )
        answers = [number for number, message in enumerate(row.messages, start=1) if message["role"] == "assistant"]
        cut = itertools.chain(row.cut, itertools.repeat(False))
        return [_whole(text, row, *turn) for turn in zip(spans, answers, cut, strict=False)]

    def _spans_of_text(self, text: str) -> list[Span]:
        """The turns of text that was rendered elsewhere; the last one may lack its end."""
        spans = self.spans(text)
        end = self.template.ends[0]
        if len(open_ended := self.spans(text + end)) > len(spans):
            spans.append(Span(open_ended[-1].start, len(text), len(text)))
        if not spans:
            raise Rejected("no assistant turn", f"`text` has no {self.template.header!r}")
        return spans

    def _write(
        self, messages: Sequence[Message], tools: Any, columns: dict[str, Any], *, add_generation_prompt: bool = False
    ) -> str:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._reasons:  # gpt-oss calls it by another name
            messages = [
                {**message, "thinking": message["reasoning_content"]} if "reasoning_content" in message else message
                for message in messages
            ]
        try:
            # What `apply_chat_template` calls too, which leaves out a content of None that some templates ask for.
            (text,), _ = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.jinja,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
                **columns,
            )
            if not text.isascii():
                text.encode("utf-8")
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise Rejected("refused by the chat template", str(error)) from None
        return str(text)

    def _scaffold(self) -> str:
        """What the template writes after the header, where the model is to begin."""
        try:
            prompt = self._write(_PROBE[:1], None, {}, add_generation_prompt=True)
        except Rejected:
            return ""
        return prompt.rpartition(self.template.header)[2] if self.template.header in prompt else ""


def _variables(jinja: str) -> set[str]:
    """What a template reads from outside."""
    import jinja2
    from jinja2 import meta

    source = re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", jinja)  # a tag of transformers' own
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)  # noqa: S701 - renders nothing
    except jinja2.TemplateError:
        return set()
    return set(meta.find_undeclared_variables(parsed))


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """A conversation in the forms that templates want it in.

    Where a message is nothing but calls, its content is empty text to some and nothing to others; the arguments of a
    call are an object to most and JSON text to some.
    """
    if not any("tool_calls" in message for message in messages):
        yield messages
        return
    for nothing, as_text in itertools.product(("", None), (False, True)):
        yield [_in_form(message, nothing, as_text) if "tool_calls" in message else message for message in messages]


def _in_form(message: Message, nothing: str | None, as_text: bool) -> Message:
    content = nothing if message["content"] is None else message["content"]
    if not as_text:
        return {**message, "content": content}
    functions = [call["function"] for call in message["tool_calls"]]
    written = [{**function, "arguments": as_json(function["arguments"])} for function in functions]
    calls = [{**call, "function": function} for call, function in zip(message["tool_calls"], written, strict=True)]
    return {**message, "content": content, "tool_calls": calls}


def _generated(message: Message) -> str:
    """What a model wrote whose prompt had opened its reasoning; nothing where it did not reason."""
    content: str = message["content"] or ""
    if message["role"] != "assistant" or "tool_calls" in message:
        return ""
    if reasoning := message.get("reasoning_content"):
        return f"{reasoning}\n</think>\n\n{content}" if content else str(reasoning)
    return _OPENED.sub("", content) if "</think>" in content else ""


def _apart(message: Message) -> Message:
    """Reasoning that was cut off in the text of an answer, beside it: a template would write it as what was said."""
    content: str = message["content"] or ""
    if message["role"] != "assistant" or "</think>" in content or not _OPENED.search(content):
        return message
    return {**message, "content": "", "reasoning_content": _OPENED.sub("", content)}


def _whole(text: str, row: Row, span: Span, number: int, is_cut: bool) -> Span:
    """A turn's span, once all that the model wrote is seen to be in it; reasoning of earlier turns may be left out.

    Where it was cut off while it reasoned, its end is that of the reasoning: the closing tag is the template's.

    Raises:
        Rejected: the template did not write the turn's text, its reasoning, or one of its calls.
    """
    message = row.messages[number - 1]
    turn = text[span.start : span.end]
    content = (message["content"] or "").rpartition("</think>")[2].strip()
    if content not in turn:
        raise Rejected(_NOT_WRITTEN, f"message {number}: this chat template does not write its text")
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    if lost := next((name for name in names if turn.count(name) < names.count(name)), None):
        raise Rejected(_NOT_WRITTEN, f"message {number}: this chat template does not write its call of {lost[:40]}")
    reasoning = message.get("reasoning_content", "").strip()
    if number == len(row.messages) and reasoning not in turn:
        raise Rejected(_NOT_WRITTEN, f"message {number}: this chat template does not write its reasoning")
    if is_cut and not content and not names and reasoning in turn:
        return replace(span, end=span.start + turn.rfind(reasoning) + len(reasoning))
    return span


_QUESTION, _ANSWER = "probing question", "probing answer"
_PROBE = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]


def check_fit(tokenizer: Any, template: Template) -> None:
    """Sees that a tokenizer and a named template belong together, on a probe conversation.

    Args:
        tokenizer: the target's.
        template: the one that parameter chat_template names.

    Raises:
        DraftModelError: the tokenizer lacks the template's turn markers, or its own chat template writes
            other ones; says what was found and which of the four names fits.
    """
    if _fits(tokenizer, template):
        return
    fitting = [other.name for other in TEMPLATES.values() if _fits(tokenizer, other)]
    advice = f"use {' or '.join(fitting)}" if fitting else f"none of {', '.join(TEMPLATES)} fits this model"
    if tokenizer.chat_template:
        found = f"the tokenizer's own chat template writes {_probe(tokenizer, template)[0][-160:]!r}"
    else:
        absent = ", ".join(_absent(tokenizer, template))
        found = f"the tokenizer has no chat template, and as tokens it lacks {absent}"
    raise DraftModelError(
        f"chat_template: given {template.name!r}, whose assistant turns begin with {template.header!r}; "
        f"{found}: {advice}"
    )


def _probe(tokenizer: Any, template: Template) -> tuple[str, list[str]]:
    """What the tokenizer's template makes of the probe, and the contents of the turns that are found in it."""
    renderer = Renderer(tokenizer, template)
    try:
        text = renderer.conversation(_PROBE)
    except Rejected as refusal:
        return refusal.detail, []
    return text, [text[span.start : span.end] for span in renderer.spans(text)]


def _fits(tokenizer: Any, template: Template) -> bool:
    text, found = _probe(tokenizer, template)
    return [turn.strip() for turn in found] == [template.opening + _ANSWER] and not _absent(tokenizer, template, text)


def _absent(tokenizer: Any, template: Template, text: str | None = None) -> list[str]:
    """The control tokens (of `text`, else all) that the tokenizer would spell in pieces."""
    return [
        token
        for token in template.control
        if (text is None or token in text) and len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1
    ]
