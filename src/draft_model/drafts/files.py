"""Folders of drafts as vLLM and SGLang load them, and the layers' settings as speculators nests them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draft_model.drafts.base import WEIGHTS, Shape

LAYER = "transformer_layer_config"  # where speculators keeps the settings of the layers
LAYER_KEYS = (
    "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "vocab_size",
)  # fmt: skip


def save_draft(folder: Path, draft: Any, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a draft for serving; t2d stays bool and d2t int64.

    One that knows the whole vocabulary is saved without these, which is how engines recognise it.
    """
    whole = draft.config.draft_vocab_size == draft.config.vocab_size
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in draft.state_dict().items()
        if not (whole and name in ("t2d", "d2t"))
    }
    write_draft(folder, draft.config.to_json(), tensors)


def write_draft(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes config.json and weights as they are."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def vocabulary_of(tensors: Mapping[str, Tensor], config: Shape) -> tuple[Tensor, Tensor]:
    """The vocabulary of a checkpoint, t2d bool [V] and d2t int64 [D]; all tokens where it holds none."""
    if (d2t := tensors.get("d2t")) is not None:
        t2d, ids = torch.zeros(config.vocab_size, dtype=torch.bool), torch.arange(len(d2t)) + d2t
        if bool(((ids >= 0) & (ids < config.vocab_size)).all()):  # else t2d says what does not fit
            t2d[ids] = True
        return tensors.get("t2d", t2d), d2t
    return torch.ones(config.vocab_size, dtype=torch.bool), torch.zeros(config.vocab_size, dtype=torch.int64)


def speculators_layer(
    config: Mapping[str, Any], keys: Iterable[str], model_type: str, outside: Iterable[str]
) -> dict[str, Any]:
    """A speculators configuration in one level: the layers' settings, and those of `outside` that are there.

    It leaves out what equals the default of the layers' class, `model_type` where that is not named.
    """
    from transformers import AutoConfig

    given = dict(config[LAYER])
    layer = AutoConfig.for_model(given.pop("model_type", model_type), **given).to_dict()
    return {key: layer[key] for key in (*LAYER_KEYS, *keys) if key in layer} | {
        key: config[key] for key in outside if config.get(key) is not None
    }


def speculators_config(name: str, target: Mapping[str, Any]) -> dict[str, Any]:
    """What every configuration of speculators 0.9 says of the method and the target."""
    method = {"proposal_type": "greedy", "speculative_tokens": target["proposals"]}
    return {
        "speculators_model_type": name,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": name,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": target["name"], "architectures": target["architectures"]},
        },
    }
