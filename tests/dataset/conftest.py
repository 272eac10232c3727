"""Small real tokenizers with the real special tokens, and templates that behave as the published ones."""

import json
from pathlib import Path

import pytest

from draft_model import storage

_OWN = {path.stem: path.read_text().removesuffix("\n") for path in (Path(__file__).parent / "templates").iterdir()}
# The same of a model that always reasons: the prompt opens the block.
_THINKING = _OWN["qwen3"].partition("{%- if add_generation_prompt %}")[0] + (
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)

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
    "qwen2": ("qwen", _CHATML, _OWN["qwen2"], _QWEN_WORDS, None, "<|im_end|>"),
    "qwen3": ("qwen", [*_CHATML, "<think>", "</think>"], _OWN["qwen3"], _QWEN_WORDS, None, "<|im_end|>"),
    "qwen3-thinking": ("qwen", [*_CHATML, "<think>", "</think>"], _THINKING, _QWEN_WORDS, None, "<|im_end|>"),
    "llama3": ("llama3", _LLAMA, _OWN["llama3"], _LLAMA_WORDS, "<|begin_of_text|>", "<|eot_id|>"),
    "deepseek": ("deepseek-r1-distill", _DEEPSEEK, _OWN["deepseek"], _QWEN_WORDS, _DEEPSEEK[0], _DEEPSEEK[1]),
    "gpt-oss": ("gpt-oss", _HARMONY, _OWN["gpt-oss"], _HARMONY_WORDS, "<|startoftext|>", "<|return|>"),
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
