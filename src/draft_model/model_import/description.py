"""The light half of an import: configuration and tokenizer, ahead of the weights, for whoever needs no more.

The data set is built beside the transfer of the weights, not after it. Both halves are of the same model: the light
one says which version it has seen, and the heavy one brings that version or refuses.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.model_import import weights
from draft_model.model_import.check import check_model
from draft_model.model_import.convert import convert
from draft_model.model_import.sources import Source, read, resolve
from draft_model.parameters import Parameters
from draft_model.shown import table
from draft_model.storage import Content, LocalContent

STAGE = "description"
_GGUF_HEADER = 256 * 2**20
"""Bytes of a GGUF file that hold its configuration and tokenizer, of the largest vocabularies, too."""


@dataclass(frozen=True)
class DescriptionConfig:
    """What to describe.

    Attributes:
        output: URI of the folder to write; `{version}` in it stands for the model's version.
        work: scratch folder on this machine.
        parameters: of the run; exactly one model source is given.
    """

    output: str
    work: Path
    parameters: Parameters


@dataclass(frozen=True)
class Description:
    """What is known of a model before its weights move.

    Attributes:
        uri: of a folder with configuration and tokenizer, which the dataset stage takes for the model.
        source: the model, as the user gave it.
        version: changes with the model's files; of a Hub repository its commit.
        architecture: transformers' class.
        licence: as the source names it; empty where it names none.
        weights: the kind of weight files, how many there are, and their bytes.
    """

    uri: str
    source: str
    version: str
    architecture: str
    licence: str
    weights: tuple[str, int, int]

    def markdown(self) -> str:
        """What the KFP UI shows."""
        kind, count, size = self.weights
        rows = {
            "model": self.source,
            "version": self.version,
            "architecture": self.architecture,
            "licence": self.licence or "none named",
            "weights": f"{count} {kind} file{'s' * (count != 1)}, {size / 1e9:,.2f} GB",
        }
        return table(rows)


def describe(config: DescriptionConfig) -> Description:
    """Publishes the model's configuration and tokenizer; of its weights no more is read than they hold of these.

    Args:
        config: what to look at and where to write.

    Raises:
        DraftModelError: with all that can be known to keep the model from being a target; nothing is published then.
    """
    config.work.mkdir(parents=True, exist_ok=True)
    source = resolve(config.parameters, config.work)
    problems: list[str] = []
    choice = weights.choose(source.files, problems)
    version = version_of(source, choice)
    files = {name: source.files[name] for name in source.described_by}
    if choice.kind == "gguf":
        files = _inside_gguf(source, choice.names[0], config.work) | files
    output = config.output.replace("{version}", version)
    facts = check_model(_written(files, config.work), source.name, problems, weights=False)
    storage.publish_contents(
        {name: content.hashed() if isinstance(content, LocalContent) else content for name, content in files.items()},
        output,
        stage=STAGE,
        properties={"source": source.name, "revision": source.revision, "version": version},
    )
    size = sum(source.files[name].size for name in choice.names)
    held = (choice.kind, len(choice.names), size)
    return Description(output, source.name, version, facts.architecture, source.licence(), held)


def version_of(source: Source, choice: weights.Choice) -> str:
    """Changes with the model's files; weights are told by size and stamp, so none is read.

    Args:
        source: the model.
        choice: its weight files.
    """
    if source.revision:
        return source.revision
    digest = hashlib.sha256()
    for name in source.described_by:
        digest.update(f"{name}\0".encode() + hashlib.sha256(read(source.files[name])).digest())
    for name in choice.names:
        content = source.files[name]
        digest.update(f"{name}\0{content.size}\0{content.stamp}\0".encode())
    return digest.hexdigest()[:16]


def pinned(source: Source, choice: weights.Choice, version: str) -> None:
    """Refuses a model that is not the one that was described.

    Raises:
        DraftModelError: where it has changed.
    """
    if version and (found := version_of(source, choice)) != version:
        raise DraftModelError(
            f"{source.parameter}: {source.name} has changed since this run looked at it (version {found}, then "
            f"{version}); start the run again, so that tokenizer and weights are of one version"
        )


def _written(files: dict[str, Content], work: Path) -> Path:
    folder = work / "described"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(read(content))
    return folder


def _inside_gguf(source: Source, name: str, work: Path) -> dict[str, Content]:
    """Configuration and tokenizer out of a GGUF file's header: the tensors' place is left a hole in a sparse file."""
    header, made = work / "header", work / "converted-header"
    for folder in (header, made):
        shutil.rmtree(folder, ignore_errors=True)
    header.mkdir()
    content = source.files[name]
    path = header / name
    path.write_bytes(content.read(0, min(content.size, _GGUF_HEADER)))
    os.truncate(path, content.size)
    try:
        convert("gguf-header", [path], made)
    except DraftModelError as error:
        raise DraftModelError([f"target model {source.name}: {problem}" for problem in error.problems]) from error
    return {file.name: LocalContent(file) for file in sorted(made.iterdir())}
