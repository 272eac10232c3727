"""The checkpoint that vLLM and SGLang load unchanged: config.json and model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from draft_model.drafts.eagle3.config import DraftConfig
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.errors import DraftModelError

WEIGHTS = "model.safetensors"


def save_draft(folder: Path, draft: Eagle3Draft, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the draft for serving.

    A draft that knows the whole vocabulary is saved without t2d and d2t, which is how engines recognise it.

    Args:
        folder: made if missing.
        draft: the draft, float32.
        dtype: type of the saved weights; t2d stays bool and d2t int64.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    whole = draft.config.draft_vocab_size == draft.config.vocab_size
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in draft.state_dict().items()
        if not (whole and name in ("t2d", "d2t"))
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(draft.config.to_json(), indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def load_draft(folder: Path) -> Eagle3Draft:
    """Reads what `save_draft` wrote, into float32.

    Args:
        folder: with config.json and model.safetensors.

    Raises:
        DraftModelError: when a file is missing, or the tensors are not those of the configuration.
    """
    from safetensors.torch import load_file

    try:
        config = DraftConfig.from_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, KeyError, ValueError) as error:
        raise DraftModelError(f"{folder} holds no EAGLE-3 draft that this version can read: {error}") from error
    t2d, d2t = vocabulary_of(tensors, config)
    draft = Eagle3Draft(config, t2d, d2t)
    load_weights(draft, tensors, str(folder))
    return draft


def vocabulary_of(tensors: dict[str, Tensor], config: DraftConfig) -> tuple[Tensor, Tensor]:
    """The vocabulary of a checkpoint, t2d bool [V] and d2t int64 [D]; all tokens where it holds none."""
    if "d2t" in tensors:
        return tensors["t2d"], tensors["d2t"]
    return torch.ones(config.vocab_size, dtype=torch.bool), torch.zeros(config.vocab_size, dtype=torch.int64)


def load_weights(draft: Eagle3Draft, tensors: dict[str, Tensor], source: str) -> None:
    """Copies a checkpoint's weights into a draft.

    Args:
        draft: of the same shape.
        tensors: by checkpoint name.
        source: what an error names.

    Raises:
        DraftModelError: when a tensor is missing or of another shape.
    """
    own = {name: parameter for name, parameter in draft.named_parameters()}
    missing = sorted(own.keys() - tensors.keys())
    misfits = [
        f"{name}: {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if missing or misfits:
        raise DraftModelError(
            f"the checkpoint {source} does not fit this draft: "
            + "; ".join([*(f"{name} is missing" for name in missing), *sorted(misfits)])
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
