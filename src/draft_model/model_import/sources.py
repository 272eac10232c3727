"""Where a target model comes from: the Hugging Face Hub, a Transformers folder, or an MLflow model."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters

logger = logging.getLogger(__name__)

_BELOW = (".", "model", "model_artifact/model", "data/model")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "README.md"]


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    Attributes:
        folder: with config.json and weights.
        name: as the user gave it.
        revision: commit of a Hub repository, else empty.
        licence: as the model card names it, else empty.
        tokenizer: folder of the tokenizer where it is not in `folder`.
    """

    folder: Path
    name: str
    revision: str = ""
    licence: str = ""
    tokenizer: Path | None = None


def resolve(parameters: Parameters, work: Path) -> Source:
    """Brings the one given source to this machine.

    Args:
        parameters: of the run.
        work: scratch folder for what is downloaded.

    Raises:
        DraftModelError: when it is missing, unreadable or of another kind than its parameter says.
    """
    if parameters.huggingface_id:
        return _from_hub(parameters.huggingface_id, work / "hub")
    if parameters.mlflow_model_path:
        return _from_mlflow(parameters.mlflow_model_path, work / "mlflow")
    return _from_folder(parameters.pytorch_model_path, work / "source")


def _from_folder(uri: str, work: Path) -> Source:
    root = _tree("pytorch_model_path", uri, work)
    if (root / "MLmodel").exists():
        raise DraftModelError(
            f"pytorch_model_path: {uri} is an MLflow model (it has an MLmodel file): use mlflow_model_path"
        )
    folder = _transformers_folder(root)
    if folder is None:
        places = ", ".join(f"`{place}/`" for place in _BELOW[1:])
        raise DraftModelError(
            f"pytorch_model_path: {uri} has no config.json, neither there nor in {places}; "
            "give a folder that transformers' save_pretrained wrote"
        )
    return Source(folder, uri, licence=_licence(root))


def _from_mlflow(uri: str, work: Path) -> Source:
    if uri.startswith(("models:/", "runs:/")):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        work.mkdir(parents=True, exist_ok=True)
        try:
            root = Path(download_artifacts(artifact_uri=uri, dst_path=str(work)))
        except (MlflowException, OSError) as error:
            raise DraftModelError(f"mlflow_model_path: {uri} cannot be downloaded: {error}") from error
    else:
        root = _tree("mlflow_model_path", uri, work)
    if not (root / "MLmodel").exists():
        raise DraftModelError(
            f"mlflow_model_path: {uri} has no MLmodel file; for a plain Transformers folder use pytorch_model_path"
        )
    try:
        flavours = yaml.safe_load((root / "MLmodel").read_text(encoding="utf-8"))["flavors"]
        names = ", ".join(sorted(flavours)) or "none"
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DraftModelError(f"mlflow_model_path: {uri} has an MLmodel file that cannot be read: {error}") from error
    if "transformers" not in flavours:
        raise DraftModelError(f"mlflow_model_path: {uri} has the flavours {names}; allowed: transformers")
    folder = _transformers_folder(root)
    if folder is None:
        raise DraftModelError(f"mlflow_model_path: {uri} holds no model with a config.json below its MLmodel")
    tokenizers = [root / place for place in ("components/tokenizer", "data/tokenizer")]
    return Source(folder, uri, tokenizer=next((path for path in tokenizers if path.is_dir()), None))


def _from_hub(name: str, work: Path) -> Source:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    repository, _, revision = name.partition("@")
    try:
        info = HfApi().model_info(repository, revision=revision or None)
        commit = str(info.sha)
        snapshot_download(repository, revision=commit, local_dir=work, allow_patterns=_HUB_FILES)
    except (HTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DraftModelError(
            f"huggingface_id: {name} cannot be downloaded: {reason}; check the name and revision, the network or "
            "HF_ENDPOINT, and for a gated model the token in HF_TOKEN"
        ) from error
    return Source(work, name, revision=commit, licence=_licence(work))


def _tree(parameter: str, uri: str, work: Path) -> Path:
    try:
        return storage.fetch_tree(uri, work)
    except DraftModelError as error:
        raise DraftModelError([f"{parameter}: {problem}" for problem in error.problems]) from error


def _transformers_folder(root: Path) -> Path | None:
    return next((root / place for place in _BELOW if (root / place / "config.json").exists()), None)


def _licence(folder: Path) -> str:
    """The licence in the YAML header of a model card."""
    card = folder / "README.md"
    if not card.exists() or not (text := card.read_text(encoding="utf-8", errors="replace")).startswith("---"):
        return ""
    try:
        header = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return ""
    return str(header.get("license", "")) if isinstance(header, dict) else ""
