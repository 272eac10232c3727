"""Where a target model comes from: the Hugging Face Hub, a Transformers folder, or an MLflow model.

Its files are listed where they lie, with sizes and version stamps, and brought to this machine when needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters

INDEX = "model.safetensors.index.json"
CARD = "README.md"
_MODEL_FILES = ("config.json", "generation_config.json")
_KNOWN = {
    *_MODEL_FILES,
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
}  # fmt: skip
_NAMED_TEMPLATE = re.compile(r"additional_chat_templates/[\w-]+\.jinja")
_MAX_SMALL_FILE = 200 * 10**6  # bytes; no configuration, tokenizer or index is larger
_MAX_MLMODEL = 10**6
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "trainer_state", "rng_state", "scaler", "adapter_", "consol")
_BELOW = ("", "model/", "model_artifact/model/", "data/model/")
_TOKENIZERS_BELOW = ("components/tokenizer/", "data/tokenizer/")


@dataclass(frozen=True)
class File:
    """A file of a listing."""

    size: int | None  # bytes; None where the source does not say
    stamp: str  # changes with the content: an ETag, a Git object's id, a modification time
    sha256: str = ""  # where the source states it


@dataclass(frozen=True)
class Listing:
    """The files of a folder, a repository or a logged model."""

    files: Mapping[str, File]  # by their paths
    bring: Callable[[Iterable[str]], dict[str, Path]]  # local paths of some of the files; downloads what is remote
    revision: str = ""  # commit of a Hub repository
    uri: str = ""  # the folder where `storage` can reach it


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
    from draft_model.model_import import hub

    scratch = work / "source"
    if name := parameters.huggingface_id:
        listing = hub.find(name, scratch)
        return Source("huggingface_id", name, listing, _inside(listing.files, ""))
    if uri := parameters.mlflow_model_path:
        return _from_mlflow(uri, scratch, parameters.mlflow_tracking_uri)
    uri = parameters.pytorch_model_path
    listing = list_stored(uri, scratch, "pytorch_model_path")
    if "MLmodel" in listing.files:
        raise DraftModelError(
            f"pytorch_model_path: {uri} is an MLflow model (it has an MLmodel file): use mlflow_model_path"
        )
    below = next((folder for folder in _BELOW if f"{folder}config.json" in listing.files), None)
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
    from draft_model.model_import import mlflow_models

    registered = uri.startswith(("models:/", "runs:/"))
    listing = mlflow_models.find(uri, scratch, server) if registered else list_stored(uri, scratch, "mlflow_model_path")
    files, start = listing.files, f"mlflow_model_path: {uri}"
    if "MLmodel" not in files:
        raise DraftModelError(f"{start} has no MLmodel file; for a plain Transformers folder use pytorch_model_path")
    try:
        if (files["MLmodel"].size or 0) > _MAX_MLMODEL:
            raise ValueError(f"it has more than {_MAX_MLMODEL} bytes")
        text = listing.bring(["MLmodel"])["MLmodel"].read_text(encoding="utf-8")
        flavours = sorted(map(str, yaml.load(text, _PlainLoader)["flavors"]))  # noqa: S506  (a safe loader)
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DraftModelError(f"{start} has an MLmodel file that cannot be read: {error}") from error
    if "transformers" not in flavours:
        raise DraftModelError(f"{start} has the flavours {', '.join(flavours) or 'none'}; allowed: transformers")
    found = {CARD: CARD} if CARD in files else {}
    found |= _inside(files, "data/config/")
    names = {*files, *(f"data/model/{name}" for name in found)}
    below = next((folder for folder in _BELOW if f"{folder}config.json" in names), None)
    if below is None:
        raise DraftModelError(f"{start} holds no model with a config.json below its MLmodel")
    found |= _inside(files, below)
    for folder in _TOKENIZERS_BELOW:
        inside = _inside(files, folder)
        found |= {name: inside[name] for name in description(inside) if name not in _MODEL_FILES}
    return Source("mlflow_model_path", uri, listing, found)


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases, by which a few lines become gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has YAML aliases")
        return super().compose_node(parent, index)


def _inside(files: Iterable[str], folder: str) -> dict[str, str]:
    """The files of one folder by their names there; of its sub-folders only the tokenizer's named chat templates."""
    inside = {name.removeprefix(folder): name for name in files if name.startswith(folder)}
    return {name: path for name, path in inside.items() if "/" not in name or description([name])}


def list_stored(uri: str, scratch: Path, parameter: str) -> Listing:
    """Lists a folder on a disk or in an object store; its files are downloaded to a scratch folder, local ones stay."""
    inside: list[Path] = []
    try:
        files = {name: File(size, stamp) for name, (size, stamp) in storage.list_files(uri).items()}
        if not storage.is_remote(uri):
            top = storage.fetch_tree(uri, scratch).resolve()
            # The Hub's cache keeps the files of a snapshot beside it, in `blobs`.
            inside = [top, *([top.parent.parent / "blobs"] if top.parent.name == "snapshots" else [])]
    except DraftModelError as error:
        raise DraftModelError([f"{parameter}: {problem}" for problem in error.problems]) from error

    def bring(names: Iterable[str]) -> dict[str, Path]:
        found = {}
        for name in names:
            path = storage.fetch_file(storage.join(uri, name), (scratch / name).parent)
            if inside and not any(path.resolve().is_relative_to(folder) for folder in inside):
                raise DraftModelError(
                    f"{uri}: {name} is a link that leads out of the folder; put a copy of the file in its place"
                )
            if path.stat().st_size != files[name].size:
                raise DraftModelError(f"{uri}: {name} changed while it was read; import it again when it is complete")
            found[name] = path
        return found

    return Listing(files, bring, uri=uri)


def description(names: Iterable[str]) -> list[str]:
    """The configuration and tokenizer files among a model's files, by their exact names."""
    return sorted(name for name in names if name in _KNOWN or _NAMED_TEMPLATE.fullmatch(name))


def check_small(names: Iterable[str], files: Mapping[str, File]) -> None:
    """Refuses files that are too large to be what their names say, before any is read."""
    if large := [name for name in names if (files[name].size or 0) > _MAX_SMALL_FILE]:
        raise DraftModelError([f"its {name} has more than {_MAX_SMALL_FILE // 10**6} MB" for name in large])


@dataclass(frozen=True)
class Weights:
    """The weight files of a model, and what is wrong with them."""

    kind: Literal["safetensors", "pickle"]
    names: list[str]
    index: str = ""  # says which tensor is in which file
    problems: list[str] = field(default_factory=list)


def choose_weights(source: Source) -> Weights:
    """Decides which of a model's files hold the weights: safetensors, else PyTorch's."""
    files = source.files
    kinds: list[tuple[Literal["safetensors", "pickle"], str, str, tuple[str, ...]]] = [
        ("safetensors", INDEX, "model.safetensors", (".safetensors",)),
        ("pickle", "pytorch_model.bin.index.json", "pytorch_model.bin", (".bin", ".pt", ".pth")),
    ]
    top = sorted(name for name in files if "/" not in name and not name.startswith(_NO_WEIGHTS))
    for kind, index, single, endings in kinds:
        if index in files:
            try:
                check_small([index], files)
                content = json.loads(source.bring([index])[index].read_bytes())
                named = sorted({str(name) for name in content["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DraftModelError) as error:
                return Weights(kind, [], index, [f"its {index} cannot be read: {error}"])
            outside = [f"{index} names {name}, which is not beside it" for name in named if "/" in name]
            beside = [name for name in named if "/" not in name]
            missing = [f"{name} is missing, which {index} names" for name in beside if name not in files]
            return Weights(kind, [name for name in beside if name in files], index, outside + missing)
        if names := [single] if single in files else [name for name in top if name.endswith(endings)]:
            return Weights(kind, names)
    reason = "it has no weights (safetensors, or PyTorch's .bin, .pt or .pth)"
    if any(name.endswith(".gguf") for name in top):
        reason = (
            "it has GGUF weights, which are quantised for llama.cpp and not taken: use the original model, or convert "
            "it with AutoModelForCausalLM.from_pretrained(folder, gguf_file=name) and save_pretrained"
        )
    return Weights("safetensors", [], problems=[reason])
