"""The checkpoint that vLLM and SGLang load unchanged, and block drafts of other trainers read as such.

Published drafts carry our names. speculators writes the target's embedding and head too, and a configuration that holds
the layers' in `transformer_layer_config`; its feature layers are counted as ours, after so many layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draft_model.drafts.base import WEIGHTS, load_weights
from draft_model.drafts.dspark.config import BlockConfig
from draft_model.drafts.dspark.model import BlockDraft
from draft_model.errors import DraftModelError

_OF_TARGET = ("embed_tokens.", "lm_head.", "verifier_lm_head.", "verifier_norm.", "rotary_emb.")
_LAYER = "transformer_layer_config"
_OUTSIDE = (
    "block_size", "mask_token_id", "sample_from_anchor", "markov_rank", "markov_head_type", "enable_confidence_head",
    "confidence_head_with_markov", "draft_vocab_size", "architectures",
)  # fmt: skip

_LAYER_KEYS = (
    "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "vocab_size", "layer_types",
)  # fmt: skip


def save_draft(folder: Path, draft: BlockDraft, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the draft for serving.

    Args:
        folder: made if missing.
        draft: the draft, float32.
        dtype: type of the saved weights.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype).contiguous().cpu() for name, tensor in draft.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(draft.config.to_json(), indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def load_draft(folder: Path) -> BlockDraft:
    """Reads what `save_draft` wrote, into float32.

    Args:
        folder: with config.json and model.safetensors.

    Raises:
        DraftModelError: when a file is missing, or the tensors are not those of the configuration.
    """
    from safetensors.torch import load_file

    try:
        config = BlockConfig.from_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, KeyError, ValueError) as error:
        raise DraftModelError(f"{folder} holds no block draft that this version can read: {error}") from error
    draft = BlockDraft(config, *vocabulary_of(tensors, config))
    load_weights(draft, tensors, str(folder))
    return draft


def vocabulary_of(_tensors: Mapping[str, Tensor], config: BlockConfig) -> tuple[Tensor, Tensor]:
    """The whole vocabulary as t2d, bool [V], and d2t, int64 [V]."""
    return torch.ones(config.vocab_size, dtype=torch.bool), torch.zeros(config.vocab_size, dtype=torch.int64)


def canonical(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], uri: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A draft's configuration and weights as our own checkpoints have them.

    Args:
        config: its config.json.
        tensors: its weights.
        uri: what an error names.

    Raises:
        DraftModelError: when it holds tensors that this draft does not have.
    """
    named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in named.items() if not name.startswith(_OF_TARGET)}
    known = (
        "layers.",
        "fc.weight",
        "norm.weight",
        "hidden_norm.weight",
        "markov_head.markov_w",
        "confidence_head.proj.",
    )
    strange = [name for name in kept if not name.startswith(known) or name.endswith("proj.bias")]
    if strange := sorted(set(strange) - {"confidence_head.proj.bias"}):
        raise DraftModelError(f"{uri}: the draft trained here has no place for {', '.join(strange)}")
    if "confidence_head.proj.weight" in kept:
        kept.setdefault("confidence_head.proj.bias", torch.zeros(1))
    if _LAYER not in config:
        return dict(config), kept
    from transformers import AutoConfig

    given = dict(config[_LAYER])
    # What equals the default of its class is left out of the file.
    layer = AutoConfig.for_model(given.pop("model_type", "qwen3"), **given).to_dict()
    outside = {key: config[key] for key in _OUTSIDE if config.get(key) is not None}
    layers = config.get("aux_hidden_state_layer_ids") or []
    own = {key: layer[key] for key in _LAYER_KEYS if key in layer} | outside
    return own | {"target_layer_ids": [layer - 1 for layer in layers]}, kept


def exported(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], form: str, target: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint as another tool writes its own: both engines read ours, speculators its own configuration.

    Args:
        config: of `canonical`.
        tensors: of `canonical`.
        form: `vllm`, `sglang` or `speculators`.
        target: for `speculators`: the target's `name` and `architectures`, and how many `proposals` serve best.
    """
    if form != "speculators":
        return dict(config), dict(tensors)
    name = "dspark" if config.get("markov_rank") else "dflash"
    layers = config.get("dflash_config", config)
    verifier = {"name_or_path": target["name"], "architectures": target["architectures"]}
    method = {"proposal_type": "greedy", "speculative_tokens": target["proposals"]}
    return {
        **{key: config[key] for key in _OUTSIDE if key in config},
        "architectures": ["DSparkDraftModel" if name == "dspark" else "DFlashDraftModel"],
        "speculators_model_type": name,
        "speculators_version": "0.9.0",
        "draft_vocab_size": config["vocab_size"],
        "mask_token_id": layers["mask_token_id"],
        "aux_hidden_state_layer_ids": [layer + 1 for layer in layers["target_layer_ids"]],
        "transformer_layer_config": {"model_type": "qwen3"} | {key: config[key] for key in _LAYER_KEYS},
        "speculators_config": {
            "algorithm": name, "default_proposal_method": "greedy", "proposal_methods": [method], "verifier": verifier,
        },
    }, dict(tensors)  # fmt: skip
