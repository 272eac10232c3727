"""The four chat templates: which characters of a rendered conversation are the assistant's.

The text itself is written by the tokenizer's own chat template. A name says only what an assistant turn looks like in
that text, as one regular expression: the header, the content, the token that ends the turn. The header is what an
engine puts before generation begins, with the scaffold of a template that opens the model's reasoning for it; the
content is all that the model writes then, reasoning, tool calls and the channels of gpt-oss included. Messages that
contain a control token are refused beforehand, so nothing in the text can be mistaken for a marker.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from draft_model.dataset.reader import Message, Rejected, Row
from draft_model.errors import DraftModelError

# A template that writes today's date would make another data set each day.
_ONE_DATE = "{% macro strftime_now(format) %}{{ {'%d %b %Y': '26 Jul 2024'}.get(format, '2024-07-26') }}{% endmacro +%}"


@dataclass(frozen=True)
class Span:
    """An assistant turn, as character offsets into the rendered text.

    Attributes:
        start: first character of the content.
        end: one past the content; the end-of-turn token begins here.
        close: one past the end-of-turn token.
    """

    start: int
    end: int
    close: int


@dataclass(frozen=True)
class Template:
    """What one `chat_template` name stands for.

    Attributes:
        name: the parameter's value.
        header: what an engine writes before the assistant's content.
        headers: expression for it, where it takes other forms too.
        ends: the tokens that end a turn; the first is the one that the model writes after an answer.
        control: tokens that frame turns; a tokenizer of this kind has each as one token, a message may have
            none.
        jinja: for a tokenizer without a chat template.
        content: expression for the content.
        opening: what the model writes before the text of an answer.
    """

    name: str
    header: str
    headers: str
    ends: tuple[str, ...]
    control: tuple[str, ...]
    jinja: str
    content: str = ".*?"
    opening: str = ""

    def turns(self, scaffold: str = "") -> re.Pattern[str]:
        """An assistant turn in rendered text, with the groups `content` and `end`.

        Args:
            scaffold: what the tokenizer's template writes between header and generation.
        """
        ends = "|".join(map(re.escape, self.ends))
        header = f"(?:{self.headers})(?:{re.escape(scaffold)})?"
        return re.compile(f"{header}(?P<content>{self.content})(?P<end>{ends})", re.DOTALL)

    def refuse_control_tokens(self, row: Row) -> None:
        """Refuses text that the tokenizer would take for a marker.

        Raises:
            Rejected: a message, or a tool, has one of the template's control tokens in its text.
        """
        for number, message in enumerate(row.messages, start=1):
            where = f"message {number} ({message['role']})"
            for value in message.values():
                self._refuse_in(value if isinstance(value, str) else _as_json(value), where)
        if row.tools:
            self._refuse_in(_as_json(row.tools), "`tools`")

    def _refuse_in(self, text: str, where: str) -> None:
        if "<" in text and (found := next((token for token in self.control if token in text), None)):
            raise Rejected("control token", f"{where} contains {found}")


def _as_json(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


# A template puts an empty block before an answer of a model that can reason and did not: it wrote it, not the model.
_EMPTY_THINK = "(?:<think>\n\n</think>\n\n)?"
_HARMONY_TEXT = r"[^<]*(?:<(?!\|(?:end|return|call|start)\|>)[^<]*)*"

LLAMA3 = Template(
    name="llama3",
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    headers=re.escape("<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ends=("<|eot_id|>", "<|eom_id|>"),
    control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>"),
    jinja=(
        "<|begin_of_text|>{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
        "{{ message.content.strip() + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
)
QWEN = Template(
    name="qwen",
    header="<|im_start|>assistant\n",
    headers=re.escape("<|im_start|>assistant\n") + _EMPTY_THINK,
    ends=("<|im_end|>",),
    control=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    jinja=(
        "{% if messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
)
GPT_OSS = Template(
    name="gpt-oss",
    header="<|start|>assistant",
    headers=re.escape("<|start|>assistant"),
    # One generation: channels that end in <|end|> are followed by the next, up to an answer or a call.
    content=rf"(?:<\|channel\|>(?:analysis|commentary)[^<]*<\|message\|>{_HARMONY_TEXT}<\|end\|><\|start\|>assistant)*"
    rf"[^<]*(?:<\|channel\|>[^<]*)?(?:<\|constrain\|>[^<]*)?<\|message\|>{_HARMONY_TEXT}",
    ends=("<|return|>", "<|end|>", "<|call|>"),
    opening="<|channel|>final<|message|>",
    control=(
        "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>",
        "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>",
    ),
    jinja=(
        "{{ '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
        "<|end|>' }}"
        "{% for message in messages %}"
        "{% if message.role == 'system' %}"
        "{{ '<|start|>developer<|message|># Instructions\n\n' + message.content + '<|end|>' }}"
        "{% elif message.role == 'user' %}"
        "{{ '<|start|>user<|message|>' + message.content + '<|end|>' }}"
        "{% else %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + message.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    ),
)  # fmt: skip
DEEPSEEK = Template(
    name="deepseek-r1-distill",
    header="<｜Assistant｜>",
    headers="<｜Assistant｜>|<｜tool▁outputs▁end｜>(?!<｜User｜>)",  # after a tool's output the assistant goes on
    ends=("<｜end▁of▁sentence｜>",),
    control=("<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    jinja=(
        "<｜begin▁of▁sentence｜>{% for message in messages %}"
        "{% if message.role == 'system' %}{{ message.content }}"
        "{% elif message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
        "{% else %}{{ '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
    ),
)
TEMPLATES: dict[str, Template] = {template.name: template for template in (LLAMA3, QWEN, GPT_OSS, DEEPSEEK)}


def template_text(tokenizer: Any, template: Template) -> str:
    """The Jinja text to render with: the tokenizer's own, else the named one's; its date is fixed."""
    text: str = tokenizer.get_chat_template() if tokenizer.chat_template else template.jinja
    return _ONE_DATE + text if "strftime_now" in text else text


_OURS = {"messages", "tools", "add_generation_prompt", "continue_final_message", "strftime_now", "raise_exception"}


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
        text = self._conversation(row)
        spans = self.spans(text)
        if len(spans) != row.answers:
            raise Rejected(
                "assistant turns not found",
                f"{row.answers} assistant turns given, {len(spans)} in what the chat template makes of them",
            )
        return text, spans

    def spans(self, text: str) -> list[Span]:
        """The assistant turns of a rendered conversation, in order."""
        return [Span(m.start("content"), m.end("content"), m.end("end")) for m in self._turns.finditer(text)]

    def _spans_of_text(self, text: str) -> list[Span]:
        """The same of text that was rendered elsewhere; its last turn may lack the end."""
        spans = self.spans(text)
        end = self.template.ends[0]
        if len(open_ended := self.spans(text + end)) > len(spans):
            spans.append(Span(open_ended[-1].start, len(text), len(text)))
        if not spans:
            raise Rejected("no assistant turn", f"`text` has no {self.template.header!r}")
        return spans

    def _conversation(self, row: Row) -> str:
        columns = {name: value for name, value in row.columns.items() if name in self._columns}
        if row.tools and not re.search(r"\btools\b", self.jinja):
            raise Rejected("not in the chat template", "the row has `tools`, which this chat template does not write")
        for number, message in enumerate(row.messages, start=1):
            if message.get("tool_calls") and "tool_calls" not in self.jinja:
                raise Rejected(
                    "not in the chat template",
                    f"message {number} has `tool_calls`, which this chat template does not write",
                )
        if any("reasoning_content" in message for message in row.messages) and not self._reasons:
            return self._with_reasoning(row, columns)
        try:
            return self._write(row.messages, row.tools, columns)
        except TypeError as error:  # some templates want the arguments of a call as JSON text
            messages = [_arguments_as_text(message) for message in row.messages]
            if messages == row.messages:
                raise Rejected("refused by the chat template", str(error)) from None
        try:
            return self._write(messages, row.tools, columns)
        except TypeError as error:
            raise Rejected("refused by the chat template", str(error)) from None

    def _with_reasoning(self, row: Row, columns: dict[str, Any]) -> str:
        """For a template that opens the model's reasoning and writes none: the last turn as it was generated.

        The reasoning of earlier turns is left out, as an engine leaves it out of the prompt.
        """
        if "<think>" not in self.scaffold:
            raise Rejected("not in the chat template", "`reasoning_content`, which this chat template does not write")
        messages = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in row.messages]
        last = row.messages[-1]
        if "reasoning_content" not in last or last.get("tool_calls"):
            return self._write(messages, row.tools, columns)
        answer = f"\n</think>\n\n{last['content']}" if last["content"] else ""
        prompt = self._write(messages[:-1], row.tools, columns, add_generation_prompt=True)
        return f"{prompt}{last['reasoning_content']}{answer}{self.template.ends[0]}"

    def _write(
        self, messages: list[Message], tools: Any, columns: dict[str, Any], *, add_generation_prompt: bool = False
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
        except (jinja2.TemplateError, ValueError) as error:
            raise Rejected("refused by the chat template", str(error)) from None
        return str(text)

    def _scaffold(self) -> str:
        """What the template writes after the header, where the model is to begin."""
        try:
            prompt = self._write([{"role": "user", "content": _QUESTION}], None, {}, add_generation_prompt=True)
        except (Rejected, TypeError):
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


def _arguments_as_text(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _as_json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


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


_QUESTION, _ANSWER = "probing question", "probing answer"
_PROBE = Row(messages=[{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}])


def _probe(tokenizer: Any, template: Template) -> tuple[str, list[str]]:
    """What the tokenizer's template makes of the probe, and the contents of the turns that are found in it."""
    renderer = Renderer(tokenizer, template)
    try:
        text = renderer._conversation(_PROBE)
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
