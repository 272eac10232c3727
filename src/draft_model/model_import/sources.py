"""Where a target model comes from: the Hugging Face Hub, a Transformers folder, or an MLflow model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.model_import import hub, tracking
from draft_model.parameters import Parameters
from draft_model.storage import Content

_BELOW = ("", "model/", "model_artifact/model/", "data/model/")
_TOKENIZERS_BELOW = ("components/tokenizer/", "data/tokenizer/")
_CONFIGS_BELOW = ("data/config/",)
MODEL_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer*.json",
    "tokenizer.model",
    "chat_template.*",
)
_CARD = "README.md"
_MOST_DESCRIPTION = 200 * 10**6
"""Bytes; no file that only describes a model is larger."""


@dataclass(frozen=True)
class Source:
    """A model where it is now.

    Attributes:
        parameter: that named it.
        name: as the user gave it.
        files: of the model's folder by their names there, its tokenizer's with them; no sub-folder.
        revision: commit of a Hub repository, else empty.
    """

    parameter: str
    name: str
    files: Mapping[str, Content]
    revision: str = ""

    @property
    def described_by(self) -> list[str]:
        """The names of configuration and tokenizer files."""
        return described_by(self.files)

    def licence(self) -> str:
        """As the YAML header of the model card names it, else empty."""
        card = self.files.get(_CARD)
        if card is None or card.size > _MOST_DESCRIPTION:
            return ""
        text = read(card).decode(errors="replace")
        if not text.startswith("---"):
            return ""
        try:
            header = yaml.safe_load(text.split("---", 2)[1])
        except (yaml.YAMLError, IndexError):
            return ""
        return str(header.get("license", "")) if isinstance(header, dict) else ""


def described_by(names: Mapping[str, Content]) -> list[str]:
    """Which of a folder's files are its configuration's and its tokenizer's."""
    patterns = (*MODEL_FILES, *TOKENIZER_FILES)
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))


def read(content: Content) -> bytes:
    """All of a small file."""
    with content.open() as reader:
        return reader(0, content.size)


def resolve(parameters: Parameters, work: Path, commit: str = "") -> Source:
    """Finds the one given source; no weights are read.

    Args:
        parameters: of the run.
        work: scratch folder for what is downloaded.
        commit: of a Hub repository, where it is known already what its revision means.

    Raises:
        DraftModelError: when it is missing, unreadable or of another kind than its parameter says.
    """
    if parameters.huggingface_id:
        return _from_hub(parameters.huggingface_id, work / "hub", commit)
    if parameters.mlflow_model_path:
        return _from_mlflow(parameters.mlflow_model_path, work / "mlflow", parameters.mlflow_tracking_uri)
    return _from_folder(parameters.pytorch_model_path)


def _from_hub(name: str, work: Path, commit: str) -> Source:
    commit, files = hub.find(f"{name.partition('@')[0]}@{commit}" if commit else name, work)
    files = {file: content for file, content in files.items() if "/" not in file}
    small = [*described_by(files), *(file for file in files if file == _CARD or file.endswith(".index.json"))]
    return Source("huggingface_id", name, hub.bring(files, small), commit)


def _from_folder(uri: str) -> Source:
    files = _contents("pytorch_model_path", uri)
    if "MLmodel" in files:
        raise DraftModelError(
            f"pytorch_model_path: {uri} is an MLflow model (it has an MLmodel file): use mlflow_model_path"
        )
    place = _model_place(files)
    if place is None:
        places = ", ".join(f"`{place}`" for place in _BELOW[1:])
        raise DraftModelError(
            f"pytorch_model_path: {uri} has no config.json, neither there nor in {places}; "
            "give a folder that transformers' save_pretrained wrote, or one GGUF file"
        )
    card = {_CARD: files[_CARD]} if _CARD in files else {}
    return Source("pytorch_model_path", uri, card | _inside(files, place))


def _from_mlflow(uri: str, work: Path, server: str) -> Source:
    logged = uri.startswith(("models:/", "runs:/"))
    files = tracking.find(uri, work, server) if logged else _contents("mlflow_model_path", uri)
    if "MLmodel" not in files:
        raise DraftModelError(
            f"mlflow_model_path: {uri} has no MLmodel file; for a plain Transformers folder use pytorch_model_path"
        )
    try:
        flavours: dict[str, Any] = yaml.safe_load(read(files["MLmodel"]).decode())["flavors"]
        names = ", ".join(sorted(flavours)) or "none"
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DraftModelError(f"mlflow_model_path: {uri} has an MLmodel file that cannot be read: {error}") from error
    if "transformers" not in flavours:
        raise DraftModelError(f"mlflow_model_path: {uri} has the flavours {names}; allowed: transformers")
    found: dict[str, Content] = {_CARD: files[_CARD]} if _CARD in files else {}
    for place in _CONFIGS_BELOW:
        found |= _inside(files, place)
    below = _model_place({**files, **{f"data/model/{name}": content for name, content in found.items()}})
    if below is None:
        raise DraftModelError(f"mlflow_model_path: {uri} holds no model with a config.json below its MLmodel")
    found |= _inside(files, below)
    for place in _TOKENIZERS_BELOW:
        inside = _inside(files, place)
        found |= {name: inside[name] for name in described_by(inside) if name not in MODEL_FILES}
    return Source("mlflow_model_path", uri, found)


def _contents(parameter: str, uri: str) -> dict[str, Content]:
    try:
        return storage.contents_of(uri)
    except DraftModelError as error:
        raise DraftModelError([f"{parameter}: {problem}" for problem in error.problems]) from error


def _model_place(files: Mapping[str, Content]) -> str | None:
    """The first of the usual places with a configuration, or with one GGUF file, which holds its own."""
    for place in _BELOW:
        if f"{place}config.json" in files:
            return place
    for place in _BELOW:
        if sum(name.endswith(".gguf") for name in _inside(files, place)) == 1:
            return place
    return None


def _inside(files: Mapping[str, Content], place: str) -> dict[str, Content]:
    names = {name.removeprefix(place): name for name in files if name.startswith(place)}
    return {short: files[name] for short, name in names.items() if "/" not in short}
