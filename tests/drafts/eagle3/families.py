"""Tiny random targets of transformers' own classes, one per family that people train drafts for, by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB, POSITIONS = 8, 32, 48, 4, 2, 64, 256
SHAPE = {
    "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "max_position_embeddings": POSITIONS,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
             "beta_slow": 1.0},
}  # fmt: skip


def rope(kind: str, theta: float, **more: Any) -> dict[str, Any]:
    """The settings of one rotary embedding."""
    return {"rope_parameters": {**ROPES[kind], "rope_theta": theta, **more}}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rms_norm_eps": 1e-5, **rope("llama3", 5e5)}),
    "mistral": ("MistralConfig", {"rms_norm_eps": 1e-4, "head_dim": 16, "sliding_window": 7}),
    "qwen2": ("Qwen2Config", rope("yarn", 1e6)),
    "qwen3": ("Qwen3Config", {"head_dim": 16, **rope("default", 1e6)}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7,
                                 **rope("yarn", 15e4, truncate=False)}),
    # DeepSeek-R1's distilled models, with the settings that theirs have besides Llama's and Qwen2's.
    "deepseek distill llama": ("LlamaConfig", {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "mlp_bias": False,
                                               **rope("llama3", 5e5)}),
    "deepseek distill qwen": ("Qwen2Config", {"tie_word_embeddings": False, "use_sliding_window": False,
                                              "sliding_window": 7, "max_window_layers": 5, **rope("default", 1e4)}),
    "phi3": ("Phi3Config", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 7}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 7}),
}  # fmt: skip


def target_config(family: str, **changes: Any) -> Any:
    """The configuration object of a tiny target."""
    import transformers

    name, settings = FAMILIES[family]
    return getattr(transformers, name)(**{**SHAPE, **settings, **changes})


def config_json(folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    """The config.json that transformers writes for it."""
    target_config(family, **changes).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def save_target(folder: Path, family: str) -> None:
    """Saves a model with random weights in every tensor, norms and biases too."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(target_config(family))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
