"""Where a target model comes from: the Hugging Face Hub, a Transformers folder, or an MLflow model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from draft_model.errors import DraftModelError
from draft_model.model_import import hub, mlflow_models
from draft_model.model_import.files import CARD, MODEL_FILES, File, Listing, description, list_stored
from draft_model.parameters import Parameters

_BELOW = ("", "model/", "model_artifact/model/", "data/model/")
_TOKENIZERS_BELOW = ("components/tokenizer/", "data/tokenizer/")
_MAX_MLMODEL = 10**6


@dataclass(frozen=True)
class Source:
    """A model where it lies now."""

    parameter: str  # that named it
    name: str  # as the user gave it
    listing: Listing  # all files
    paths: Mapping[str, str]  # of the files in the listing, by their names in one Transformers folder

    @property
    def files(self) -> dict[str, File]:
        """The model's and the tokenizer's files by their names in one Transformers folder."""
        return {name: self.listing.files[path] for name, path in self.paths.items()}

    def bring(self, names: Iterable[str]) -> dict[str, Path]:
        """Gives local paths of files, downloading what is remote."""
        wanted = {name: self.paths[name] for name in names}
        found = self.listing.bring(list(wanted.values())) if wanted else {}
        return {name: found[path] for name, path in wanted.items()}


def resolve(parameters: Parameters, work: Path) -> Source:
    """Finds the one given source, and refuses one of another kind than its parameter says; reads no weights."""
    scratch = work / "source"
    if name := parameters.huggingface_id:
        listing = hub.find(name, scratch)
        return Source("huggingface_id", name, listing, _inside(listing.files, ""))
    if uri := parameters.mlflow_model_path:
        return _from_mlflow(uri, scratch, parameters.mlflow_tracking_uri)
    return _from_folder(parameters.pytorch_model_path, scratch)


def _from_folder(uri: str, scratch: Path) -> Source:
    listing = _stored("pytorch_model_path", uri, scratch)
    if "MLmodel" in listing.files:
        raise DraftModelError(
            f"pytorch_model_path: {uri} is an MLflow model (it has an MLmodel file): use mlflow_model_path"
        )
    below = _model_folder(listing.files)
    if below is None:
        folders = ", ".join(f"`{folder}`" for folder in _BELOW[1:])
        gguf = "; GGUF files are not taken" if any(name.endswith(".gguf") for name in listing.files) else ""
        raise DraftModelError(
            f"pytorch_model_path: {uri} has no config.json, neither there nor in {folders}; "
            f"give a folder that transformers' save_pretrained wrote{gguf}"
        )
    card = {CARD: CARD} if CARD in listing.files else {}
    return Source("pytorch_model_path", uri, listing, card | _inside(listing.files, below))


def _from_mlflow(uri: str, scratch: Path, server: str) -> Source:
    registered = uri.startswith(("models:/", "runs:/"))
    listing = mlflow_models.find(uri, scratch, server) if registered else _stored("mlflow_model_path", uri, scratch)
    files = listing.files
    if "MLmodel" not in files:
        raise DraftModelError(
            f"mlflow_model_path: {uri} has no MLmodel file; for a plain Transformers folder use pytorch_model_path"
        )
    flavours = _flavours(uri, listing)
    if "transformers" not in flavours:
        names = ", ".join(flavours) or "none"
        raise DraftModelError(f"mlflow_model_path: {uri} has the flavours {names}; allowed: transformers")
    found = {CARD: CARD} if CARD in files else {}
    found |= _inside(files, "data/config/")
    below = _model_folder({*files, *(f"data/model/{name}" for name in found)})
    if below is None:
        raise DraftModelError(f"mlflow_model_path: {uri} holds no model with a config.json below its MLmodel")
    found |= _inside(files, below)
    for folder in _TOKENIZERS_BELOW:
        inside = _inside(files, folder)
        found |= {name: inside[name] for name in description(inside) if name not in MODEL_FILES}
    return Source("mlflow_model_path", uri, listing, found)


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases, by which a few lines become gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has YAML aliases")
        return super().compose_node(parent, index)


def _flavours(uri: str, listing: Listing) -> list[str]:
    try:
        if (listing.files["MLmodel"].size or 0) > _MAX_MLMODEL:
            raise ValueError(f"it has more than {_MAX_MLMODEL} bytes")
        text = listing.bring(["MLmodel"])["MLmodel"].read_text(encoding="utf-8")
        return sorted(map(str, yaml.load(text, _PlainLoader)["flavors"]))  # noqa: S506  (a safe loader)
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DraftModelError(f"mlflow_model_path: {uri} has an MLmodel file that cannot be read: {error}") from error


def _stored(parameter: str, uri: str, scratch: Path) -> Listing:
    try:
        return list_stored(uri, scratch)
    except DraftModelError as error:
        raise DraftModelError([f"{parameter}: {problem}" for problem in error.problems]) from error


def _model_folder(names: Collection[str]) -> str | None:
    return next((folder for folder in _BELOW if f"{folder}config.json" in names), None)


def _inside(files: Iterable[str], folder: str) -> dict[str, str]:
    """The files of one folder by their names there; of its sub-folders only the tokenizer's named chat templates."""
    inside = {name.removeprefix(folder): name for name in files if name.startswith(folder)}
    return {name: path for name, path in inside.items() if "/" not in name or description([name])}
