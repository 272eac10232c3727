"""Drafts of other trainers, read as ours: the same layer under other names.

SpecForge writes our names and sometimes the target's embeddings too. speculators writes `layers.0.*`, the embeddings,
and a configuration that holds the layer's in `transformer_layer_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from draft_model.errors import DraftModelError

_ELSEWHERE = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")
"""The target's, which a training takes from the target itself."""
_TENSORS = {
    "fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d",
    *(f"midlayer.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"midlayer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"midlayer.{name}.weight" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")),
}  # fmt: skip
_LAYER = "transformer_layer_config"
_LAYER_KEYS = frozenset(
    [
        "attention_bias",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "vocab_size",
    ]
)
_OTHER_MATHS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def canonical(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], uri: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A draft's configuration and weights as our own checkpoints have them.

    Args:
        config: its config.json.
        tensors: its weights and vocabulary.
        uri: what an error names.

    Raises:
        DraftModelError: when it is a draft of other maths, or holds what ours has no place for.
    """
    renamed = {
        name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name: tensor
        for name, tensor in tensors.items()
        if name not in _ELSEWHERE
    }
    problems = [f"{uri}: `{name}` is set, and the draft trained here has no such step" for name in _OTHER_MATHS
                if config.get(name)]  # fmt: skip
    if strange := sorted(renamed.keys() - _TENSORS):
        problems.append(f"{uri}: the draft trained here has no place for {', '.join(strange)}")
    if problems:
        raise DraftModelError(problems)
    for name, dtype in (("t2d", torch.bool), ("d2t", torch.int64)):
        if name in renamed:
            renamed[name] = renamed[name].to(dtype)
    return _flat(config) if _LAYER in config else dict(config), renamed


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    given = dict(config[_LAYER])
    # What equals the default of its class is left out of the file.
    layer = AutoConfig.for_model(given.pop("model_type", "llama"), **given).to_dict()
    kept = {key: value for key, value in layer.items() if key in _LAYER_KEYS}
    outside = ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids", "target_hidden_size")
    return kept | {key: config[key] for key in outside if config.get(key) is not None}
