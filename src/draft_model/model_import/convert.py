"""Weights in other formats become safetensors, in a process of its own.

A PyTorch file is a pickle, and a pickle is a program: it is read with `weights_only=True`, which knows tensors and
containers and nothing else, by a process that has no keys in its environment. GGUF files are dequantised.

Usage: python -m draft_model.model_import.convert pickle|gguf|gguf-header FOLDER FILE...
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draft_model.errors import DraftModelError

_SECRET = re.compile(r"^(AWS_|HF_|MLFLOW_|KFP_)|TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY")
_NESTED = ("state_dict", "model_state_dict", "model")
_REFUSED = 3


def convert(kind: str, paths: Sequence[Path], into: Path) -> str:
    """Converts weight files in a separate process.

    Args:
        kind: `pickle` or `gguf`; `gguf-header` for configuration and tokenizer alone.
        paths: the files.
        into: a folder for the safetensors; with GGUF also for configuration and tokenizer.

    Returns:
        What was done, for the manifest.

    Raises:
        DraftModelError: where a file cannot be converted, or wants to run code.
    """
    into.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    done = subprocess.run(
        [sys.executable, "-m", "draft_model.model_import.convert", kind, str(into), *map(str, paths)],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    said = done.stdout.strip().splitlines()[-1:]
    if done.returncode == 0 and said:
        return str(json.loads(said[0]))
    if done.returncode == _REFUSED and said:
        raise DraftModelError(str(json.loads(said[0])))
    files = ", ".join(path.name for path in paths)
    if done.returncode < 0:
        raise DraftModelError(
            f"{files}: the conversion to safetensors was ended by signal {-done.returncode}, most often for want of "
            "memory: give the import more, or convert the model elsewhere with save_pretrained"
        )
    raise RuntimeError(f"the conversion of {files} failed:\n{done.stderr}")


def _convert_pickles(into: Path, paths: list[Path]) -> str:
    from safetensors.torch import save_file

    for number, path in enumerate(paths, 1):
        tensors = _tensors(path)
        name = "model" if len(paths) == 1 else f"model-{number:05}-of-{len(paths):05}"
        save_file(tensors, into / f"{name}.safetensors", metadata={"format": "pt"})
    return "PyTorch weights, rewritten as safetensors"


def _tensors(path: Path) -> dict[str, Any]:
    """The state dictionary of a PyTorch file; tensors that share memory are written each."""
    import pickle

    import torch

    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of before PyTorch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DraftModelError(
            f"{path.name} holds more than tensors, which is never run here ({_what(error)}): save the model's "
            "state_dict, or the model with save_pretrained, which writes safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError) as error:
        raise DraftModelError(f"{path.name} is damaged or no PyTorch file: {_first_line(error)}") from error
    for name in _NESTED:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not any(isinstance(value, torch.Tensor) for value in found.values()):
        raise DraftModelError(f"{path.name} holds no state_dict (tensors by name): save the model with save_pretrained")
    seen: set[int] = set()
    tensors = {}
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            start = value.untyped_storage().data_ptr()
            tensors[str(name)] = (
                value.clone(memory_format=torch.contiguous_format) if start in seen else value.contiguous()
            )
            seen.add(start)
    return tensors


def _what(error: Exception) -> str:
    named = re.search(r"GLOBAL ([\w.]+)|(?:class|function|global) ([\w.]+)", str(error))
    return f"it asks for {named[1] or named[2]}" if named else _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _convert_gguf(into: Path, paths: list[Path]) -> str:
    import torch
    from gguf import GGUFReader, LlamaFileType
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (path,) = paths
    try:
        field = GGUFReader(path).fields.get("general.file_type")
        name = LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_") if field else "unknown"
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise DraftModelError(f"{path.name} is damaged or no GGUF file: {_first_line(error)}") from error
    dtype = {"ALL_F32": torch.float32, "F16": torch.float16}.get(name, torch.bfloat16)
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:
        raise DraftModelError(f"{path.name} cannot be read by transformers: {_first_line(error)}") from error
    # Its weights are plain tensors by now, but transformers would refuse to save them as a quantised model's.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(dtype).save_pretrained(into, max_shard_size="5GB")
    tokenizer.save_pretrained(into)
    return f"dequantised from GGUF ({name}) to {str(dtype).removeprefix('torch.')}"


def _convert_gguf_header(into: Path, paths: list[Path]) -> str:
    from transformers import AutoConfig, AutoTokenizer

    (path,) = paths
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        AutoConfig.from_pretrained(**source).save_pretrained(into)
        AutoTokenizer.from_pretrained(**source).save_pretrained(into)
    except Exception as error:
        raise DraftModelError(f"{path.name} cannot be read by transformers: {_first_line(error)}") from error
    return "configuration and tokenizer of a GGUF file"


_CONVERSIONS = {"pickle": _convert_pickles, "gguf": _convert_gguf, "gguf-header": _convert_gguf_header}


def main(kind: str, into: Path, paths: list[Path]) -> int:
    """Converts; prints one line of JSON.

    Args:
        kind: a key of _CONVERSIONS.
        into: where to.
        paths: the files.

    Returns:
        0, or 3 where the files are refused.
    """
    try:
        said, code = _CONVERSIONS[kind](into, paths), 0
    except DraftModelError as error:
        said, code = str(error), _REFUSED
    print(json.dumps(said))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]]))
