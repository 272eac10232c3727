"""Block drafts of other trainers read as our own checkpoints, and these as speculators writes them.

Published drafts carry our names. speculators writes the target's embedding and head too, and a configuration that holds
the layers' in `transformer_layer_config`; its feature layers are counted as ours, after so many layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from draft_model.drafts import files
from draft_model.errors import DraftModelError

_OF_TARGET = ("embed_tokens.", "lm_head.", "verifier_lm_head.", "verifier_norm.", "rotary_emb.")
_KNOWN = re.compile(
    r"layers\.\d+\.(?!.*proj\.bias).*|(fc|norm|hidden_norm)\.weight|markov_head\.markov_w.*|confidence_head\.proj\..*"
)
_OUTSIDE = (
    "block_size", "mask_token_id", "sample_from_anchor", "markov_rank", "markov_head_type", "enable_confidence_head",
    "confidence_head_with_markov", "draft_vocab_size", "architectures",
)  # fmt: skip


def canonical(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], uri: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A draft of any trainer as our own checkpoints have it; `Family.read`."""
    named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in named.items() if not name.startswith(_OF_TARGET)}
    if strange := sorted(name for name in kept if not _KNOWN.fullmatch(name)):
        raise DraftModelError(f"{uri}: the draft trained here has no place for {', '.join(strange)}")
    if "confidence_head.proj.weight" in kept:
        kept.setdefault("confidence_head.proj.bias", torch.zeros(1))
    if files.LAYER not in config:
        return dict(config), kept
    layers = [layer - 1 for layer in config.get("aux_hidden_state_layer_ids") or []]
    return files.speculators_layer(config, ["layer_types"], "qwen3", _OUTSIDE) | {"target_layer_ids": layers}, kept


def exported(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], form: str, target: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both engines read ours; speculators has its own configuration; `Family.export`."""
    if form != "speculators":
        return dict(config), dict(tensors)
    name, architecture = ("dspark", "DSparkDraftModel") if config.get("markov_rank") else ("dflash", "DFlashDraftModel")
    layers = config.get("dflash_config", config)
    return {
        **{key: config[key] for key in _OUTSIDE if key in config},
        **files.speculators_config(name, target),
        "architectures": [architecture],
        "draft_vocab_size": config["vocab_size"],
        "mask_token_id": layers["mask_token_id"],
        "aux_hidden_state_layer_ids": [layer + 1 for layer in layers["target_layer_ids"]],
        files.LAYER: {"model_type": "qwen3"} | {key: config[key] for key in (*files.LAYER_KEYS, "layer_types")},
    }, dict(tensors)
