"""Whether a model folder can be a target: decided by its structure, before anything large is copied."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft_model.eagle3.config import draft_config_for
from draft_model.errors import DraftModelError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ModelFacts:
    """What a check found.

    Attributes:
        architecture: transformers' class.
        parameters: number of weights in the files.
        weights: safetensors files, with their index.
    """

    architecture: str
    parameters: int
    weights: list[Path]


def check_model(folder: Path, name: str) -> ModelFacts:
    """Checks configuration, structure, weights and tokenizer of a Transformers folder.

    The model is built on the meta device, without memory for its weights.

    Args:
        folder: with config.json.
        name: what errors call it.

    Raises:
        DraftModelError: with everything that keeps it from being used.
    """
    problems: list[str] = []
    config: dict[str, Any] = {}
    try:
        config = _json_object(folder / "config.json")
        draft_config_for(config)
    except (OSError, ValueError) as error:
        problems.append(f"its config.json cannot be read: {error}")
    except DraftModelError as error:
        problems += error.problems
    architecture = "" if problems else _architecture(folder, config, problems)
    weights = _weights(folder, problems)
    count = sum(_count(path, problems) for path in weights if path.suffix == ".safetensors" and path.exists())
    if not any((place / file).exists() for place in _tokenizer_places(folder) for file in _TOKENIZERS):
        problems.append("it has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    if problems:
        raise DraftModelError([f"target model {name}: {problem}" for problem in problems])
    return ModelFacts(architecture, count, weights)


def _tokenizer_places(folder: Path) -> list[Path]:
    """The model's folder, and where MLflow's layouts keep the tokenizer beside it."""
    return [folder, folder.parent / "components" / "tokenizer", folder.parent / "tokenizer"]


def _json_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _architecture(folder: Path, config: dict[str, Any], problems: list[str]) -> str:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
        decoder = model.get_decoder()
        structured = len(decoder.layers) and decoder.norm is not None
    except Exception as error:  # a configuration may make transformers raise anything
        if "auto_map" in config:
            problems.append("it needs code from its repository (trust_remote_code), which is never run here")
        else:
            problems.append(
                f"model_type {config.get('model_type')!r} is no decoder for text generation that transformers loads "
                f"with layers and a final norm: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            )
        return ""
    if not structured:
        problems.append(f"{type(model).__name__} has no decoder layers")
    return type(model).__name__


def _weights(folder: Path, problems: list[str]) -> list[Path]:
    """The index and the files that it names, else the safetensors that lie there."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        try:
            names = set(_json_object(indices[0])["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            problems.append(f"its {indices[0].name} cannot be read: {error}")
            return []
        problems += [f"{indices[0].name} names {name}, which is not beside it" for name in names if "/" in name]
        files = [folder / name for name in sorted(names) if "/" not in name]
        problems += [f"{path.name} is missing, which {indices[0].name} names" for path in files if not path.exists()]
        return [indices[0], *files]
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not files:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"; it has {', '.join(pickles[:3])}: save it with safe_serialization=True" if pickles else ""
        problems.append(f"it has no weights as safetensors{found}")
    return files


def _count(path: Path, problems: list[str]) -> int:
    """Weights in one file, from its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            total = 0
            for key in file.keys():  # noqa: SIM118  (not a dict)
                size = 1
                for length in file.get_slice(key).get_shape():
                    size *= length
                total += size
            return total
    except (SafetensorError, OSError) as error:
        problems.append(f"{path.name} is damaged or cut short: {error}")
        return 0
