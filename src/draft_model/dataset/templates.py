"""The four chat templates: which characters of a rendered conversation are the assistant's.

The text itself is written by the tokenizer's own chat template. A name says only what an assistant turn looks
like in that text, as one regular expression: the header, the content, the token that ends the turn. Messages
that contain a control token are refused beforehand, so nothing in the text can be mistaken for a marker. A
template that puts an empty `<think>` block before the answer wrote it, not the model: it counts as header.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draft_model.dataset.reader import Rejected, Turn
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
        turn: an assistant turn in rendered text, with the groups `content` and `end`.
        control: tokens that frame turns; a tokenizer of this kind has each as one token, a message may have
            none.
        header: the header, for messages.
        jinja: for a tokenizer without a chat template.
    """

    name: str
    turn: re.Pattern[str]
    control: tuple[str, ...]
    header: str
    jinja: str

    def spans(self, text: str) -> list[Span]:
        """The assistant turns of a rendered conversation, in order."""
        return [Span(m.start("content"), m.end("content"), m.end("end")) for m in self.turn.finditer(text)]

    def refuse_control_tokens(self, turns: Sequence[Turn]) -> None:
        """Refuses text that the tokenizer would take for a marker.

        Raises:
            Rejected: a message has one of the template's control tokens in its text.
        """
        for number, turn in enumerate(turns, start=1):
            if found := next((token for token in self.control if token in turn.content), None):
                raise Rejected("control token", f"message {number} ({turn.role}) contains {found}")


def _turn(header: str, *ends: str) -> re.Pattern[str]:
    return re.compile(f"{header}(?P<content>.*?)(?P<end>{'|'.join(map(re.escape, ends))})", re.DOTALL)


_EMPTY_THINK = "(?:<think>\n\n</think>\n\n)?"

LLAMA3 = Template(
    name="llama3",
    turn=_turn(re.escape("<|start_header_id|>assistant<|end_header_id|>\n\n"), "<|eot_id|>"),
    control=(
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
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
    turn=_turn(re.escape("<|im_start|>assistant\n") + _EMPTY_THINK, "<|im_end|>"),
    control=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    header="<|im_start|>assistant\n",
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
    turn=_turn(
        r"<\|start\|>assistant(?:<\|channel\|>[^<]*)?<\|message\|>", "<|end|>", "<|return|>", "<|call|>"
    ),
    control=(
        "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>",
        "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>",
    ),
    header="<|start|>assistant<|channel|>final<|message|>",
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
    turn=_turn("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    control=("<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    header="<｜Assistant｜>",
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


def render(tokenizer: Any, jinja: str, turns: Sequence[Turn]) -> str:
    """Writes a conversation as the target reads it.

    Raises:
        Rejected: the chat template refuses the conversation, for instance for the order of its roles.
    """
    import jinja2

    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text: str = tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False)
    except (jinja2.TemplateError, TypeError) as error:
        raise Rejected("refused by the chat template", str(error)) from None
    return text


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
        found = f"the tokenizer's own chat template writes {_probe(tokenizer, template)[-160:]!r}"
    else:
        absent = ", ".join(_absent(tokenizer, template))
        found = f"the tokenizer has no chat template, and as tokens it lacks {absent}"
    raise DraftModelError(
        f"chat_template: given {template.name!r}, whose assistant turns begin with {template.header!r}; "
        f"{found}: {advice}"
    )


_PROBE = (Turn("user", "probing question"), Turn("assistant", "probing answer"))


def _probe(tokenizer: Any, template: Template) -> str:
    try:
        return render(tokenizer, template_text(tokenizer, template), _PROBE)
    except Rejected as refusal:
        return refusal.detail


def _fits(tokenizer: Any, template: Template) -> bool:
    text = _probe(tokenizer, template)
    found = [text[span.start : span.end].strip() for span in template.spans(text)]
    return found == [_PROBE[1].content] and not _absent(tokenizer, template, text)


def _absent(tokenizer: Any, template: Template, text: str | None = None) -> list[str]:
    """The control tokens (of `text`, else all) that the tokenizer would spell in pieces."""
    return [
        token
        for token in template.control
        if (text is None or token in text) and len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1
    ]
