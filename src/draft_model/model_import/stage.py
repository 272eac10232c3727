"""`run`: find the source, check that the model can be used, publish what later stages need of it.

The canonical folder holds config.json, generation_config.json, safetensors (above 5 GB in shards with their index), the
tokenizer's files with the chat template, and a manifest that names source, revision, licence, architecture and
parameter count. Weights are not read before the model is known to be usable, and then they stream.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.model_import import weights
from draft_model.model_import.check import ModelFacts, check_model
from draft_model.model_import.convert import convert
from draft_model.model_import.description import pinned
from draft_model.model_import.sources import Source, read, resolve
from draft_model.model_import.tracking import ArtifactContent
from draft_model.parameters import Parameters
from draft_model.shown import table
from draft_model.storage import Content, LocalContent
from draft_model.storage.transfer import check_free_disk
from draft_model.tracking import tracked

logger = logging.getLogger(__name__)

STAGE = "import"
_AT_ONCE = 2
"""Files that are on this machine's disk at a time."""


@dataclass(frozen=True)
class ImportConfig:
    """One import.

    Attributes:
        output: URI of the folder to write.
        work: scratch folder on this machine.
        parameters: of the run; exactly one model source is given.
        version: that a look at the model has found before (see `describe`), and no other will do; empty: any.
    """

    output: str
    work: Path
    parameters: Parameters
    version: str = ""


@dataclass(frozen=True)
class ImportResult:
    """What an import leaves.

    Attributes:
        uri: of the canonical folder.
        source: what was imported, as the user gave it.
        revision: commit of a Hub repository; empty for other sources.
        licence: as the source names it; empty where it names none.
        architecture: transformers' class.
        parameter_count: number of weights; those that are used twice count once.
        conversion: what was done to weights that were no safetensors; empty for those that were.
        size: bytes of all files.
    """

    uri: str
    source: str
    revision: str
    licence: str
    architecture: str
    parameter_count: int
    conversion: str
    size: int

    def markdown(self) -> str:
        """What the KFP UI shows."""
        rows = {
            "model": self.source,
            "revision": self.revision or "none: no repository of the Hub",
            "architecture": self.architecture,
            "parameters": f"{self.parameter_count:,}",
            "size": f"{self.size / 1e9:,.2f} GB",
            "conversion": self.conversion or "none: the weights were safetensors",
            "licence": self.licence or "none named",
            "folder": self.uri,
        }
        return table(rows)


def is_weight(name: str) -> bool:
    """Whether a file of the canonical folder holds weights or tells where they are."""
    return name.endswith((".safetensors", ".safetensors.index.json"))


@tracked("import", "model")
def run(config: ImportConfig) -> ImportResult:
    """Imports the target model; where it is there already, looks whether it is whole and copies nothing.

    Args:
        config: what to import and where to.

    Raises:
        DraftModelError: when the source cannot be read or the model cannot be used; nothing is published then.
    """
    config.work.mkdir(parents=True, exist_ok=True)
    source = resolve(config.parameters, config.work, config.version)
    problems: list[str] = []
    choice = weights.choose(source.files, problems)
    pinned(source, choice, config.version)
    source = _with_hashes(source, choice)
    same = {"source": source.name, "revision": source.revision, "digest": _digest(source, choice)}
    if (found := _imported_before(config.output, same)) is not None:
        logger.info("%s is at %s already, whole: nothing is copied", source.name, config.output)
        return found
    check_free_disk(config.work, _disk_needed(source, choice))
    skeleton = _description(source, config.work)
    conversion = ""
    if choice.kind != "safetensors":
        if "config.json" in source.files:  # a GGUF file alone brings its own
            check_model(skeleton, source.name, problems, weights=False)
        source, conversion = _converted(source, choice, config.work)
        choice = weights.choose(source.files, problems)
        skeleton = _description(source, config.work)
    shards, model = _checked(source, choice, skeleton, problems)
    properties: dict[str, Any] = {
        **same,
        "licence": source.licence(),
        "architecture": model.architecture,
        "parameter_count": model.parameters,
        "conversion": conversion,
    }
    manifest = storage.publish_contents(
        {name: source.files[name] for name in source.described_by} | shards,
        config.output,
        stage=STAGE,
        properties={**properties, "parameters": config.parameters.of_stage("import")},
    )
    result = _result(config.output, manifest)
    logger.info(
        "imported %s: %s, %.1f M parameters, %.0f MB, to %s",
        source.name, model.architecture, model.parameters / 1e6, result.size / 1e6, config.output,
    )  # fmt: skip
    return result


def _result(uri: str, manifest: storage.Manifest) -> ImportResult:
    names = ("source", "revision", "licence", "architecture", "parameter_count", "conversion")
    return ImportResult(uri=uri, size=manifest.size, **{name: manifest.properties[name] for name in names})


def _with_hashes(source: Source, choice: weights.Choice) -> Source:
    """The source with the SHA-256 of what lies on this machine: what it is now is what will be published."""
    wanted = {*source.described_by, *_weight_files(choice)}
    hashed = {
        name: content.hashed() if name in wanted and isinstance(content, LocalContent) else content
        for name, content in source.files.items()
    }
    return replace(source, files=hashed)


def _weight_files(choice: weights.Choice) -> list[str]:
    return [*choice.names, *([choice.index] if choice.index else [])]


def _digest(source: Source, choice: weights.Choice) -> str:
    """Changes when a file does that counts; of a store's objects their ETags are taken."""
    digest = hashlib.sha256()
    for name in sorted({*source.described_by, *_weight_files(choice)}):
        content = source.files[name]
        known = content.sha256 if isinstance(content, LocalContent) else content.stamp
        digest.update(f"{name}\0{content.size}\0{known}\0".encode())
    return digest.hexdigest()


def _imported_before(uri: str, same: Mapping[str, str]) -> ImportResult | None:
    if not storage.exists(uri):
        return None
    try:
        manifest = storage.read_manifest(uri, stage=STAGE)
        if any(manifest.properties.get(name) != value for name, value in same.items()):
            return None
        return _result(uri, manifest) if storage.is_whole(uri, manifest) else None
    except (DraftModelError, KeyError):  # a damaged one, or an older version's, is replaced
        return None


def _disk_needed(source: Source, choice: weights.Choice) -> int:
    """Bytes of the scratch folder's disk: two files at a time, or all where they are not read in ranges."""
    contents = [source.files[name] for name in choice.names]
    sizes = sorted((content.on_disk for content in contents), reverse=True)
    if choice.kind != "safetensors":
        return sum(sizes) + sum(content.size for content in contents)
    return sum(sizes) if any(isinstance(content, ArtifactContent) for content in contents) else sum(sizes[:_AT_ONCE])


def _description(source: Source, work: Path) -> Path:
    """A folder with configuration and tokenizer."""
    folder = work / "skeleton"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in source.described_by:
        (folder / name).write_bytes(read(source.files[name]))
    return folder


def _checked(
    source: Source, choice: weights.Choice, skeleton: Path, problems: list[str]
) -> tuple[dict[str, Content], ModelFacts]:
    headers = weights.headers_of(source.files, choice.names, problems)
    shards: dict[str, Content] = {}
    if not problems:
        shards = weights.canonical(source.files, choice, headers)
        weights.write_skeleton(skeleton, shards)
    return shards, check_model(skeleton, source.name, problems, weights=bool(shards))


def _converted(source: Source, choice: weights.Choice, work: Path) -> tuple[Source, str]:
    """The source with safetensors in the place of other weights, made in a separate process."""
    made, brought = work / "converted", work / "brought"
    for folder in (made, brought):
        shutil.rmtree(folder, ignore_errors=True)
    storage.bring({name: source.files[name] for name in choice.names}, brought)
    try:
        conversion = convert(choice.kind, [brought / name for name in choice.names], made)
    except DraftModelError as error:
        raise DraftModelError([f"target model {source.name}: {problem}" for problem in error.problems]) from error
    finally:
        shutil.rmtree(brought, ignore_errors=True)
    kept = {name: content for name, content in source.files.items() if name not in _weight_files(choice)}
    contents = {path.name: LocalContent(path).hashed() for path in sorted(made.iterdir())}
    return replace(source, files={**contents, **kept}), conversion
