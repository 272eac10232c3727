"""`run`: resolve the source, check that the model can be used, publish what later stages need of it.

The canonical folder holds config.json, generation_config.json, safetensors (with their index), the tokenizer's files
with the chat template, and a manifest that names source, revision, licence, architecture and parameter count.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.model_import.check import check_model
from draft_model.model_import.sources import resolve
from draft_model.parameters import Parameters

logger = logging.getLogger(__name__)

STAGE = "import"
_KEPT = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer*.json",
    "tokenizer.model",
    "chat_template.*",
)


@dataclass(frozen=True)
class ImportConfig:
    """One import.

    Attributes:
        output: URI of the folder to write.
        work: scratch folder on this machine.
        parameters: of the run; exactly one model source is given.
    """

    output: str
    work: Path
    parameters: Parameters


@dataclass(frozen=True)
class ImportResult:
    """What an import leaves.

    Attributes:
        uri: of the canonical folder.
        source: what was imported, as the user gave it.
        revision: commit of a Hub repository; empty for other sources.
        licence: as the source names it; empty where it names none.
        architecture: transformers' class.
        parameter_count: number of weights.
        size: bytes of all files.
    """

    uri: str
    source: str
    revision: str
    licence: str
    architecture: str
    parameter_count: int
    size: int


def is_weight(name: str) -> bool:
    """Whether a file of the canonical folder holds weights or tells where they are."""
    return name.endswith((".safetensors", ".safetensors.index.json"))


def run(config: ImportConfig) -> ImportResult:
    """Imports the target model.

    Args:
        config: what to import and where to.

    Raises:
        DraftModelError: when the source cannot be read or the model cannot be used; nothing is published then.
    """
    config.work.mkdir(parents=True, exist_ok=True)
    source = resolve(config.parameters, config.work)
    model = check_model(source.folder, source.name)
    canonical = config.work / "canonical"
    shutil.rmtree(canonical, ignore_errors=True)
    canonical.mkdir()
    kept = {path for pattern in _KEPT for path in source.folder.glob(pattern)} | set(model.weights)
    for path in sorted(kept):
        _link(path, canonical / path.name)
    if source.tokenizer is not None:
        for path in sorted(path for pattern in _KEPT[2:] for path in source.tokenizer.glob(pattern)):
            _link(path, canonical / path.name)
    properties: dict[str, Any] = {
        "source": source.name,
        "revision": source.revision,
        "licence": source.licence,
        "architecture": model.architecture,
        "parameter_count": model.parameters,
    }
    manifest = storage.publish(
        canonical,
        config.output,
        stage=STAGE,
        properties={**properties, "parameters": config.parameters.of_stage("import")},
    )
    shutil.rmtree(canonical)
    result = ImportResult(uri=config.output, size=manifest.size, **properties)
    logger.info(
        "imported %s: %s, %.1f M parameters, %.0f MB, to %s",
        source.name, model.architecture, model.parameters / 1e6, result.size / 1e6, config.output,
    )  # fmt: skip
    return result


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system allows, else a copy; a second file of the same name wins."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
