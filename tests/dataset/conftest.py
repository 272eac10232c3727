"""Small real tokenizers with the real special tokens, and templates that behave as the published ones."""

import json
from pathlib import Path

import pytest

from draft_model import storage

QWEN2 = """
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>system\nYou are Qwen, a helpful assistant.<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{%- if (message.role == 'system' and not loop.first) or message.role in ['user', 'assistant'] %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# Drops the reasoning of earlier turns, and puts an empty block before an answer that has none.
QWEN3 = """
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role != 'assistant' %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- else %}
{%- set content = message.content %}{%- set reasoning = '' %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}"""

LLAMA3 = """
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' }}
{{- date_string + '\n\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

DEEPSEEK = """{% set ns = namespace(system='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{%- set ns.system = message['content'] %}
{%- endif %}{%- endfor %}{{bos_token}}{{ns.system}}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' %}
{%- set content = message['content'] %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{'<｜Assistant｜><think>\n'}}{%- endif %}"""

GPT_OSS = """
{%- macro system_message() -%}
{{- 'You are ChatGPT.\nKnowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\n\n' }}
{{- '# Valid channels: analysis, commentary, final. Channel must be included for every message.' }}
{%- endmacro -%}
{{- '<|start|>system<|message|>' }}{{- system_message() }}{{- '<|end|>' }}
{%- if messages[0].role == 'system' %}
{{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '\n\n<|end|>' }}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and loop.last and not add_generation_prompt %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
{%- elif message.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
{%- elif message.role == 'user' %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}"""

_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
_HARMONY = [
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
    "<|message|>", "<|call|>",
]  # fmt: skip

# name: chat_template, special tokens, the tokenizer's own template, whether offsets come trimmed, bos, eos
KINDS = {
    "qwen2": ("qwen", _CHATML, QWEN2, False, None, "<|im_end|>"),
    "qwen3": ("qwen", [*_CHATML, "<think>", "</think>"], QWEN3, False, None, "<|im_end|>"),
    "llama3": ("llama3", _LLAMA, LLAMA3, True, "<|begin_of_text|>", "<|eot_id|>"),
    "deepseek": ("deepseek-r1-distill", _DEEPSEEK, DEEPSEEK, False, _DEEPSEEK[0], _DEEPSEEK[1]),
    "gpt-oss": ("gpt-oss", _HARMONY, GPT_OSS, True, "<|startoftext|>", "<|return|>"),
    # Without a template of their own.
    "qwen-bare": ("qwen", _CHATML, None, True, None, "<|im_end|>"),
    "llama3-bare": ("llama3", _LLAMA, None, False, "<|begin_of_text|>", "<|eot_id|>"),
    "deepseek-bare": ("deepseek-r1-distill", _DEEPSEEK, None, True, _DEEPSEEK[0], _DEEPSEEK[1]),
    "gpt-oss-bare": ("gpt-oss", _HARMONY, None, False, "<|startoftext|>", "<|return|>"),
}

# White space runs are merged, so that a header's newline and an answer's first ones make one token.
_CORPUS = [
    "the quick brown fox jumps over the lazy dog\n\n", "\n\n\n  what is it?\n \n",
    "assistant\n\n\n\n  the answer is", "def f(x):\n        return x\n\n\n",
    "user\n   the    question   ", "Grüße aus Köln, 你好 世界, 👍🏽\n\n",
]  # fmt: skip


def _tokenizer(special, template, trimmed, bos, eos):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed)
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
        config = {"model_type": "llama", "vocab_size": len(tokenizer) + 12}
        (folder / "config.json").write_text(json.dumps(config))
        storage.publish(folder, str(folder), stage="import", properties={})
        folders[name] = folder
    return folders
