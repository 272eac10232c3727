"""A model's files where they lie now: listed with sizes and version stamps, brought to this machine when needed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from draft_model import storage
from draft_model.errors import DraftModelError

INDEX = "model.safetensors.index.json"
MODEL_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CARD = "README.md"
_NAMED_TEMPLATE = re.compile(r"additional_chat_templates/[\w-]+\.jinja")
_MAX_SMALL_FILE = 200 * 10**6  # bytes; no configuration, tokenizer or index is larger
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "trainer_state", "rng_state", "scaler", "adapter_", "consol")


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


def list_stored(uri: str, scratch: Path) -> Listing:
    """Lists a folder on a disk or in an object store; its files are downloaded to a scratch folder, local ones stay."""
    files = {name: File(size, stamp) for name, (size, stamp) in storage.list_files(uri).items()}
    inside: list[Path] = []
    if not storage.is_remote(uri):
        top = storage.fetch_tree(uri, scratch).resolve()
        # The Hub's cache keeps the files of a snapshot beside it, in `blobs`.
        inside = [top, *([top.parent.parent / "blobs"] if top.parent.name == "snapshots" else [])]

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
    known = {*MODEL_FILES, *TOKENIZER_FILES}
    return sorted(name for name in names if name in known or _NAMED_TEMPLATE.fullmatch(name))


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


def choose_weights(files: Mapping[str, File], read: Callable[[str], bytes]) -> Weights:
    """Decides which of a model's files hold the weights: safetensors, else PyTorch's; `read` gives a file's content."""
    top = sorted(name for name in files if "/" not in name and not name.startswith(_NO_WEIGHTS))
    for kind, index, single, endings in (
        ("safetensors", INDEX, "model.safetensors", (".safetensors",)),
        ("pickle", "pytorch_model.bin.index.json", "pytorch_model.bin", (".bin", ".pt", ".pth")),
    ):
        if index in files:
            return _indexed(kind, files, index, read)  # type: ignore[arg-type]
        if names := [single] if single in files else [name for name in top if name.endswith(endings)]:
            return Weights(kind, names)  # type: ignore[arg-type]
    reason = "it has no weights (safetensors, or PyTorch's .bin, .pt or .pth)"
    if any(name.endswith(".gguf") for name in top):
        reason = (
            "it has GGUF weights, which are quantised for llama.cpp and not taken: use the original model, or convert "
            "it with AutoModelForCausalLM.from_pretrained(folder, gguf_file=name) and save_pretrained"
        )
    return Weights("safetensors", [], problems=[reason])


def _indexed(
    kind: Literal["safetensors", "pickle"], files: Mapping[str, File], index: str, read: Callable[[str], bytes]
) -> Weights:
    try:
        check_small([index], files)
        names = sorted({str(name) for name in json.loads(read(index))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DraftModelError) as error:
        return Weights(kind, [], index, [f"its {index} cannot be read: {error}"])
    outside = [f"{index} names {name}, which is not beside it" for name in names if "/" in name]
    missing = [f"{name} is missing, which {index} names" for name in names if "/" not in name and name not in files]
    return Weights(kind, [name for name in names if name in files and "/" not in name], index, outside + missing)
