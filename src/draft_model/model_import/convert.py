"""PyTorch's weight files become safetensors; runs in a process with limits.

A PyTorch file is a pickle, and a pickle is a program: it is read with `weights_only=True`, which knows tensors and
containers and nothing else.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from draft_model.errors import DraftModelError


def convert(paths: list[Path], into: Path) -> None:
    """Writes the tensors of PyTorch files as safetensors into an existing folder, a file for each."""
    for number, path in enumerate(paths, 1):
        name = "model" if len(paths) == 1 else f"model-{number:05}-of-{len(paths):05}"
        save_file(_tensors(path), into / f"{name}.safetensors", metadata={"format": "pt"})


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    content = _load(path)
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise DraftModelError(f"{path.name} holds no state_dict (tensors by name): save the model with save_pretrained")
    seen: set[int] = set()
    tensors = {}
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            start = value.untyped_storage().data_ptr()
            shared = start in seen  # safetensors stores no tensor that shares memory with another
            tensors[str(name)] = value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
            seen.add(start)
    return tensors


def _load(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of before PyTorch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)|(?:class|function|global) ([\w.]+)", str(error))
        wanted = f"it asks for {named[1] or named[2]}" if named else first_line(error)
        raise DraftModelError(
            f"{path.name} holds more than tensors, which is never run here ({wanted}): save the model's state_dict, or "
            "the model with save_pretrained, which writes safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        raise DraftModelError(f"{path.name} is damaged or no PyTorch file: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
