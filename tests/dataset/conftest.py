"""Small real tokenizers with the real special tokens, and templates that behave as the published ones."""

import json
from pathlib import Path

import pytest

from draft_model import storage

# Tools in the system prompt; calls as JSON in tags; the results of tools in a turn of the user's.
QWEN2 = """
{%- if tools %}
{{- '<|im_start|>system\n' }}
{{- messages[0].content if messages[0].role == 'system' else 'You are Qwen, a helpful assistant.' }}
{{- '\n\n# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}
{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>system\nYou are Qwen, a helpful assistant.<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\n' + message.content }}{%- endif %}
{%- for call in message.tool_calls %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# Drops the reasoning of earlier turns, and puts an empty block before a last answer that has none. A turn that is
# nothing but calls has to have an empty text, for None breaks it.
QWEN3 = """
{%- if tools %}
{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- '# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}
{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{%- set content = message.content %}{%- set reasoning = '' %}
{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
{%- elif '</think>' in message.content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- if content or not loop.first %}{{- '\n' }}{%- endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

# The same of a model that always reasons: the prompt opens the block.
QWEN3_THINKING = QWEN3.partition("{%- if add_generation_prompt %}")[0] + (
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)

LLAMA3 = """
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools %}{{- 'Environment: ipython\n' }}{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content | tojson + '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length > 1 %}{{- raise_exception('only single calls at once') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson + '}<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

# Drops all reasoning, opens it in the generation prompt, wants the arguments of calls as text and no text beside them.
# A turn with a single call has no end.
DEEPSEEK = """{% set ns = namespace(system='', tool=false) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{%- set ns.system = message['content'] %}
{%- endif %}{%- endfor %}{{bos_token}}{{ns.system}}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- set ns.tool = false %}{{'<｜User｜>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is none %}
{{'<｜Assistant｜><｜tool▁calls▁begin｜>'}}
{%- for call in message['tool_calls'] %}{%- if not loop.first %}{{'\n'}}{%- endif %}
{{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] + '\n```json\n'}}
{{- call['function']['arguments'] + '\n```<｜tool▁call▁end｜>'}}
{%- if not loop.first %}{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}{%- endif %}
{%- endfor %}
{%- elif message['role'] == 'assistant' and ns.tool %}
{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- set ns.tool = false %}
{%- elif message['role'] == 'assistant' %}
{%- set content = message['content'] %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}
{%- elif message['role'] == 'tool' %}
{%- if not ns.tool %}{{'<｜tool▁outputs▁begin｜>'}}{%- endif %}{%- set ns.tool = true %}
{{'<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}
{%- endif %}
{%- endfor %}
{%- if ns.tool %}{{'<｜tool▁outputs▁end｜>'}}{%- endif %}
{%- if add_generation_prompt and not ns.tool %}{{'<｜Assistant｜><think>\n'}}{%- endif %}"""

# Reasoning in a channel of its own: that of the last turn, and of turns with a call as long as no answer follows. Of
# several calls only the first is written. A turn's end goes by its kind.
GPT_OSS = """
{%- macro system_message() -%}
{{- 'You are ChatGPT.\nKnowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\n\n' }}
{{- 'Reasoning: ' + (reasoning_effort or 'medium') + '\n\n' }}
{{- '# Valid channels: analysis, commentary, final. Channel must be included for every message.' }}
{%- endmacro -%}
{{- '<|start|>system<|message|>' }}{{- system_message() }}{{- '<|end|>' }}
{%- if messages[0].role == 'system' %}
{{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '\n\n' }}
{%- if tools %}{{- '# Tools\n\n' + tools | tojson }}{%- endif %}{{- '<|end|>' }}
{%- set messages = messages[1:] %}
{%- endif %}
{%- set ns = namespace(call=none) %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set later = namespace(answer=false) %}
{%- for other in messages[loop.index:] %}
{%- if other.role == 'assistant' and not other.tool_calls %}{%- set later.answer = true %}{%- endif %}
{%- endfor %}
{%- if message.tool_calls and message.content and message.thinking %}{{- raise_exception('not both') }}{%- endif %}
{%- set thinking = message.thinking or (message.content if message.tool_calls else '') %}
{%- if thinking and not later.answer and (message.tool_calls or (loop.last and not add_generation_prompt)) %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + thinking + '<|end|>' }}
{%- endif %}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}{%- set ns.call = call.name %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson + '<|call|>' }}
{%- elif loop.last and not add_generation_prompt %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
{%- else %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- elif message.role == 'tool' %}
{{- '<|start|>functions.' + ns.call + ' to=assistant<|channel|>commentary<|message|>' + message.content | tojson }}
{{- '<|end|>' }}
{%- elif message.role == 'user' %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

# How each family cuts text into words.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_QWEN_WORDS = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_WORDS = _QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HARMONY_WORDS = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    ]
)  # fmt: skip

_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_DEEPSEEK = [
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>",
]  # fmt: skip
_HARMONY = [
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
    "<|message|>", "<|call|>",
]  # fmt: skip

# name: chat_template, special tokens, the tokenizer's own template, how it finds words, bos, eos
KINDS = {
    "qwen2": ("qwen", _CHATML, QWEN2, _QWEN_WORDS, None, "<|im_end|>"),
    "qwen3": ("qwen", [*_CHATML, "<think>", "</think>"], QWEN3, _QWEN_WORDS, None, "<|im_end|>"),
    "qwen3-thinking": ("qwen", [*_CHATML, "<think>", "</think>"], QWEN3_THINKING, _QWEN_WORDS, None, "<|im_end|>"),
    "llama3": ("llama3", _LLAMA, LLAMA3, _LLAMA_WORDS, "<|begin_of_text|>", "<|eot_id|>"),
    "deepseek": ("deepseek-r1-distill", _DEEPSEEK, DEEPSEEK, _QWEN_WORDS, _DEEPSEEK[0], _DEEPSEEK[1]),
    "gpt-oss": ("gpt-oss", _HARMONY, GPT_OSS, _HARMONY_WORDS, "<|startoftext|>", "<|return|>"),
    # Without a template of their own; the second finds words as GPT-2 did.
    "qwen-bare": ("qwen", _CHATML, None, _QWEN_WORDS, None, "<|im_end|>"),
    "smol-bare": ("qwen", _CHATML, None, None, None, "<|im_end|>"),
    "llama3-bare": ("llama3", _LLAMA, None, _LLAMA_WORDS, "<|begin_of_text|>", "<|eot_id|>"),
    "deepseek-bare": ("deepseek-r1-distill", _DEEPSEEK, None, _LLAMA_WORDS, _DEEPSEEK[0], _DEEPSEEK[1]),
    "gpt-oss-bare": ("gpt-oss", _HARMONY, None, _HARMONY_WORDS, "<|startoftext|>", "<|return|>"),
}

# White space runs are merged, so that a header's newline and an answer's first ones make one token.
_CORPUS = [
    "the quick brown fox jumps over the lazy dog\n\n", "\n\n\n  what is it?\n \n",
    "assistant\n\n\n\n  the answer is", "def f(x):\n        return x\n\n\n",
    "user\n   the    question   ", "Grüße aus Köln, 你好 世界, 👍🏽\n\n",
]  # fmt: skip


def _tokenizer(special, template, words, bos, eos):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words:
        find = pre_tokenizers.Split(Regex(words), "isolated")
        cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([find, cut])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=500, min_frequency=2, show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Imported model folders by the names of KINDS, as the import stage leaves them, without weights."""
    folders = {}
    for name, (_, *rest) in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        tokenizer = _tokenizer(*rest)
        tokenizer.save_pretrained(folder)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 8}
        config = {"model_type": "llama", "vocab_size": len(tokenizer) + 12, **sizes}
        (folder / "config.json").write_text(json.dumps(config))
        storage.publish(folder, str(folder), stage="import", properties={})
        folders[name] = folder
    return folders


def sentencepiece(style):
    """A ChatML tokenizer as sentencepiece makes them, which puts a space before each text, in one of four ways."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", *(f"<0x{code:02X}>" for code in range(256))]
    learner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    corpus = [
        text.replace(" ", "▁") for text in (" the quick brown fox jumps over the lazy dog", " what user assistant")
    ]
    learner.train_from_iterator(
        corpus * 4, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    )
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    core = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    if style == "legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=style, split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = ("<unk>", "<|im_start|>", "<|im_end|>")
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", unk_token="<unk>")
    fast.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return fast
