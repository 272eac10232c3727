"""One trained draft, written as each engine's own tools write theirs.

vLLM and SGLang both load what training leaves, where the feature layers stand twice, once in each engine's counting. An
export holds one engine's alone. `speculators` is the format of vLLM's library of that name: the same tensors, the layer
under `layers.0`, and a configuration that names the target, so that `vllm serve DRAFT` finds it by itself.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from draft_model import storage
from draft_model.errors import DraftModelError

logger = logging.getLogger(__name__)

Format = Literal["vllm", "sglang", "speculators"]
FORMATS: tuple[Format, ...] = get_args(Format)

_LAYERS = "eagle_aux_hidden_state_layer_ids"
_WEIGHTS = "model.safetensors"
_LEFT_OUT = (
    "config.json", _WEIGHTS, storage.MANIFEST, "report.html", "report.json", "evaluation.json", "training_state"
)  # fmt: skip
_LAYER_KEYS = (
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings",
    "mlp_bias", "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


def export(draft: str, form: Format, output: str, work: Path, target: str = "") -> str:
    """Writes a draft for one engine.

    Args:
        draft: URI of a trained draft (`.../final`), or of one of another trainer.
        form: what to write.
        output: URI of the folder to write.
        work: scratch folder.
        target: what the engine is to load as the target, a Hub id or a path; only for `speculators`. Not given: what
            training.json names.

    Returns:
        URI of the folder.

    Raises:
        DraftModelError: when the draft cannot be read, or its target is not known.
    """
    from safetensors.torch import save_file

    from draft_model.drafts.eagle3.config import layers_of, to_sglang
    from draft_model.training.checkpoint import read_checkpoint

    loaded = read_checkpoint(draft, work / "draft")
    source = fetched(draft, work / "draft")
    layers = layers_of(loaded.config)
    folder = work / "exported"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    config = loaded.config
    tensors = {name: tensor.contiguous() for name, tensor in loaded.tensors.items()}
    if form == "speculators":
        config = _speculators(config, layers, _target(source, target, draft))
        tensors = {name.replace("midlayer.", "layers.0.", 1): tensor for name, tensor in tensors.items()}
    else:
        outside = {key: value for key, value in config.items() if key not in (_LAYERS, "eagle_config")}
        nested: dict[str, Any] = {"use_aux_hidden_state": True}
        if layers and form == "sglang":
            nested[_LAYERS] = to_sglang(tuple(layers), str(loaded.config.get("target_model_type", "")))
        config = outside | ({_LAYERS: layers} if layers and form == "vllm" else {}) | {"eagle_config": nested}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    storage.publish(folder, output, stage="export", properties={"format": form, "draft": draft})
    return output


def fetched(uri: str, work: Path) -> Path:
    """A folder as a local one: verified where it has a manifest; of another trainer as it is."""
    if storage.exists(storage.join(uri, storage.MANIFEST)):
        return storage.fetch(uri, work)
    logger.info("%s has no %s: its files are taken unchecked", uri, storage.MANIFEST)
    return storage.fetch_tree(uri, work)


def _speculators(config: Mapping[str, Any], layers: list[int] | None, verifier: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of a draft in the format of speculators 0.9 (models/eagle3/config.py, config.py)."""
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "has_no_defaults_at_init": False,
        "draft_vocab_size": config["draft_vocab_size"],
        "target_hidden_size": config.get("target_hidden_size", config["hidden_size"]),
        **({_LAYERS: layers} if layers else {}),
        "norm_before_residual": False,
        "norm_before_fc": False,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": config.get("dtype", "bfloat16"),
        "transformer_layer_config": {key: config[key] for key in _LAYER_KEYS if key in config},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": verifier["proposals"]}],
            "verifier": {"name_or_path": verifier["name"], "architectures": verifier["architectures"]},
        },
    }


def _target(folder: Path, given: str, draft: str) -> dict[str, Any]:
    """What the speculators format says of the target, and of how it is best served."""
    file = folder / "training.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known = record.get("target", {})
    if not (given or known.get("source")):
        raise DraftModelError(
            f"--target: not given, and {draft} has no training.json that names its target: give the target's Hub id "
            "or path"
        )
    return {
        "name": given or str(known["source"]).partition("@")[0],
        "architectures": [known["architecture"]] if known.get("architecture") else [],
        "proposals": record.get("parameters", {}).get("num_speculative_tokens", 3),
    }
