"""The checkpoint that vLLM and SGLang load unchanged, and drafts of other trainers read as such.

SpecForge writes our names and sometimes the target's embeddings too. speculators writes `layers.0.*`, the embeddings,
and a configuration that holds the layer's in `transformer_layer_config`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from draft_model.drafts import files
from draft_model.drafts.eagle3.config import ARCHITECTURE, LAYER_IDS, SGLANG_DEEPSEEK, SWITCHES, layers_of, to_sglang
from draft_model.errors import DraftModelError

_OF_TARGET = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")
_KNOWN = (
    r"(fc|norm|lm_head)\.weight|[dt]2[dt]|midlayer\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|hidden_norm"
    r"|input_layernorm|post_attention_layernorm)\.weight"
)
_LAYER_KEYS = ("attention_bias", "hidden_act", "mlp_bias", "model_type")  # besides files.LAYER_KEYS


def canonical(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], uri: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A draft of any trainer as our own checkpoints have it; `Family.read`."""
    nested = config.get("eagle_config") or {}
    switches = {name: True for name in SWITCHES if config.get(name) or nested.get(name)}
    known = _KNOWN + r"|input_norm\.weight" * ("norm_before_fc" in switches) + r"|fc_norm\..*" * ("fc_norm" in switches)
    renamed = {re.sub(r"^layers\.0\.", "midlayer.", name): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in renamed.items() if name not in _OF_TARGET}
    problems = []
    if strange := sorted(name for name in kept if not re.fullmatch(known, name)):
        problems.append(f"{uri}: the draft trained here has no place for {', '.join(strange)}")
    if config.get("norm_before_residual") or nested.get("norm_before_residual"):
        problems.append(f"{uri}: `norm_before_residual` is set, and the draft trained here has no such step")
    if problems:
        raise DraftModelError(problems)
    for name, dtype in (("t2d", torch.bool), ("d2t", torch.int64)):
        if name in kept:
            kept[name] = kept[name].to(dtype)
    if files.LAYER not in config:
        return {**config, **switches}, kept
    outside = ("draft_vocab_size", LAYER_IDS, "target_hidden_size")
    flat = files.speculators_layer(config, _LAYER_KEYS, "llama", outside)
    return flat | switches | {"architectures": [ARCHITECTURE]}, kept


def exported(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], form: str, target: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Feature layers in that engine's counting alone, or speculators' own configuration; `Family.export`.

    Raises:
        DraftModelError: where only SGLang, which sees the target, could tell which feature layers are meant.
    """
    layers, nested_ids = layers_of(config), (config.get("eagle_config") or {}).get(LAYER_IDS)
    known = {"target_model_type", LAYER_IDS} & config.keys() or config.get("model_type") in SGLANG_DEEPSEEK
    if form != "sglang" and not known and nested_ids and nested_ids[0] > 1:  # 1 means 2 layers for every target
        raise DraftModelError(
            f"--target-type: not given, and the draft does not name its target. SGLang reads {nested_ids}, its nested "
            f"`{LAYER_IDS}`, as after {nested_ids} layers of DeepSeek's targets, and after {layers} of others: give "
            "model_type of the target's config.json, such as llama or deepseek_v3"
        )
    if form != "speculators":
        outside = {key: value for key, value in config.items() if key not in (LAYER_IDS, "eagle_config")}
        nested: dict[str, Any] = {"use_aux_hidden_state": True}
        if layers and form == "sglang":
            nested[LAYER_IDS] = to_sglang(tuple(layers), str(config.get("target_model_type", "")))
        elif layers:
            outside[LAYER_IDS] = layers
        return outside | {"eagle_config": nested}, dict(tensors)
    keys = (*files.LAYER_KEYS, *_LAYER_KEYS, "tie_word_embeddings")
    return {  # of speculators 0.9, models/eagle3/config.py and config.py
        "architectures": ["Eagle3DraftModel"],
        **files.speculators_config("eagle3", target),
        "has_no_defaults_at_init": False,
        "draft_vocab_size": config["draft_vocab_size"],
        "target_hidden_size": config.get("target_hidden_size", config["hidden_size"]),
        **({LAYER_IDS: layers} if layers else {}),
        "norm_before_residual": False,
        "norm_before_fc": False,
        **{name: True for name in SWITCHES if config.get(name)},
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": config.get("dtype", "bfloat16"),
        files.LAYER: {key: config[key] for key in keys if key in config},
    }, {name.replace("midlayer.", "layers.0.", 1): tensor for name, tensor in tensors.items()}
