"""What the stage reads, checked all at once: the target's tokenizer, the files of conversations, the draft's size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from draft_model import storage
from draft_model.dataset.files import File, find
from draft_model.dataset.pieces import Source
from draft_model.dataset.templates import TEMPLATES
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters

FORMAT = 3
"""Raised whenever this package would make something else of the same inputs."""

SplitName = Literal["train", "validation"]
_SPLITS: tuple[SplitName, ...] = ("train", "validation")
_DEFAULT_DRAFT_VOCABULARY = 32_000
_MAKERS = ("pipeline-draft-model", "tokenizers", "transformers", "jinja2")
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")

T = TypeVar("T")
Given = ParamSpec("Given")


@dataclass(frozen=True)
class Model:
    """The imported model, as far as tokens go.

    Attributes:
        folder: local folder with tokenizer files and config.json.
        hashes: sha256 of each of these files, by name.
        vocab_size: V, rows of the target's embedding.
    """

    folder: Path
    hashes: dict[str, str]
    vocab_size: int


@dataclass(frozen=True)
class Inputs:
    """All that the stage reads.

    Attributes:
        model: the target's tokenizer and vocabulary size.
        sources: the files of the training split, then of the validation split where one is given.
        draft_vocab_size: D, at most V.
        max_length: tokens that are kept of a conversation.
        fingerprint: sha256 of all that shapes the data set.
    """

    model: Model
    sources: tuple[Source, ...]
    draft_vocab_size: int
    max_length: int
    fingerprint: str


def read_inputs(parameters: Parameters, model: str, work: Path) -> Inputs:
    """Fetches and checks the inputs.

    Args:
        parameters: the run's.
        model: URI of the imported model's folder.
        work: local folder for what has to be downloaded.

    Raises:
        DraftModelError: with all that is missing, unreadable or does not fit.
    """
    problems: list[str] = []
    target = _attempt(problems, _fetch_model, model, work / "model")
    wanted = _attempt(problems, _draft_vocab_size, parameters.draft_model_config, work)
    sources: list[tuple[SplitName, str, list[tuple[File, str]] | None]] = []
    for split in _SPLITS:
        parameter = f"dataset_{split}_split"
        if given := getattr(parameters, parameter):
            sources.append((split, parameter, _attempt(problems, _files, parameter, given)))
    if not parameters.dataset_train_split:
        problems.append("dataset_train_split: not given; give the path or URI of a JSONL file of conversations")
    if target and wanted and wanted > target.vocab_size:
        problems.append(
            f"draft_model_config: its draft_vocab_size is {wanted}; allowed: at most the target's vocabulary "
            f"of {target.vocab_size}"
        )
    if problems or target is None:
        raise DraftModelError(problems)
    settings = _settings(parameters, target)
    files = tuple(
        Source(split, place, f"{parameter}: {file.uri}", file, _hash(settings, identity))
        for split, parameter, found in sources
        for place, (file, identity) in enumerate(found or ())
    )
    size = wanted or min(_DEFAULT_DRAFT_VOCABULARY, target.vocab_size)
    names = [(source.split, source.file.name, source.identity) for source in files]
    return Inputs(target, files, size, parameters.max_length, _hash(names, size, parameters.max_rejected_fraction))


def shaping(parameters: Parameters) -> dict[str, Any]:
    """The stage's parameters without the number of processes: whatever it was, the same data has the same bytes."""
    without = ("build_dataset_num_proc", "mlflow_tracking_uri")
    return {name: value for name, value in parameters.of_stage("dataset").items() if name not in without}


def data_version(parameters: Parameters) -> str:
    """Changes with the content of the files that the stage reads, whatever they are called.

    Raises:
        DraftModelError: one of them is missing or cannot be read.
    """
    given = [(f"dataset_{split}_split", getattr(parameters, f"dataset_{split}_split")) for split in _SPLITS]
    found = [[(file.name, identity) for file, identity in _files(*split)] for split in given if split[1]]
    config = parameters.draft_model_config
    return _hash(found, hashlib.sha256(storage.read_bytes(config)).hexdigest() if config else None)


def data_files(parameters: Parameters) -> list[tuple[SplitName, str, int]]:
    """The files of conversations: split, name and bytes of each.

    Raises:
        DraftModelError: one of them is missing or cannot be read.
    """
    given: list[tuple[SplitName, str]] = [(split, getattr(parameters, f"dataset_{split}_split")) for split in _SPLITS]
    return [(split, file.name, file.size) for split, uri in given if uri for file in find(uri)]


def _attempt(problems: list[str], step: Callable[Given, T], *given: Given.args, **named: Given.kwargs) -> T | None:
    """Runs a step; a user's mistake in it joins the problems, so that all are told at once."""
    try:
        return step(*given, **named)
    except DraftModelError as error:
        problems.extend(error.problems)
        return None


def _is_wanted(name: str) -> bool:
    return name == "config.json" or name.startswith(_TOKENIZER_FILES)


def _fetch_model(uri: str, into: Path) -> Model:
    manifest = storage.read_manifest(uri)
    if manifest.stage != "description":  # what the import publishes ahead of the weights is enough here
        manifest = storage.read_manifest(uri, stage="import")
    folder = storage.fetch(uri, into, only=_is_wanted)
    hashes = {file.path: file.sha256 for file in manifest.files if _is_wanted(file.path)}
    config = _json(folder / "config.json", f"model: config.json of {uri}")
    text_config = config.get("text_config")
    vocab_size = config.get("vocab_size") or (text_config.get("vocab_size") if isinstance(text_config, dict) else None)
    if not isinstance(vocab_size, int):
        raise DraftModelError(f"model: config.json of {uri} has no vocab_size; import a text-generation model")
    return Model(folder, hashes, vocab_size)


def _draft_vocab_size(given: str, work: Path) -> int | None:
    if not given:
        return None
    name = f"draft_model_config: {given}"
    try:
        path = storage.fetch_file(given, work / "draft_model_config")
    except DraftModelError as error:
        raise DraftModelError([f"draft_model_config: {problem}" for problem in error.problems]) from error
    size = _json(path, name).get("draft_vocab_size")
    if size is None:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise DraftModelError(f"{name}: its draft_vocab_size is {size!r}; allowed: an integer >= 1")
    return size


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DraftModelError(f"{name}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DraftModelError(f"{name}: holds a JSON {type(content).__name__}; it must be an object")
    return content


def _files(parameter: str, given: str) -> list[tuple[File, str]]:
    try:
        return [(file, file.identity()) for file in find(given)]
    except DraftModelError as error:
        raise DraftModelError([f"{parameter}: {problem}" for problem in error.problems]) from error
    except OSError as error:
        raise DraftModelError(f"{parameter}: {given}: cannot be read ({error}); give readable files") from error


def _settings(parameters: Parameters, model: Model) -> dict[str, Any]:
    """All that shapes what becomes of a line, and the versions of what makes it."""
    template = TEMPLATES[parameters.chat_template]
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in _MAKERS},
        "tokenizer": model.hashes,
        "vocab_size": model.vocab_size,
        "chat_template": asdict(template),
        "max_length": parameters.max_length,
    }


def _hash(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
