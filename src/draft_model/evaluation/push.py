"""Puts a finished draft with its card on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from draft_model import storage
from draft_model.errors import DraftModelError, without_credentials
from draft_model.evaluation.card import FOLDER, FOLDER_NOTE
from draft_model.model_import.hub import hub_address

_STAYS = "training_state"


def files_of(draft: str) -> list[storage.FileRecord]:
    """The files of a whole draft that go to the Hub; the state of its training stays."""
    files = [file for file in storage.read_manifest(draft).files if file.path.partition("/")[0] != _STAYS]
    if lacking := {"config.json", "model.safetensors"} - {file.path for file in files}:
        raise DraftModelError(f"{draft} is no draft, it lacks {' and '.join(sorted(lacking))}; give a draft's `final`")
    return files


def check_name(repository: str) -> None:
    """Refuses what is no `org/name`."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise DraftModelError(f"the repository: given {repository!r}; allowed: org/name")


def push(draft: str, repository: str, work: Path, *, private: bool) -> str:
    """Uploads a whole draft, checked against its manifest, in one commit; its card's commands then name the repository.

    `repository` is org/name; it is made where it is not there, with `private` for its owners only. Returns its address.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    source, staged = storage.fetch(draft, work / "draft").resolve(), work / "staged"
    shutil.copytree(source, staged, ignore=shutil.ignore_patterns(_STAYS, storage.MANIFEST), dirs_exist_ok=True)
    card = staged / "README.md"
    if card.exists():
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace(FOLDER_NOTE, "").replace(FOLDER, repository), encoding="utf-8")
    manifest = storage.read_manifest(draft)
    storage.publish(staged, str(staged), stage=manifest.stage, properties=manifest.properties)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        api = HfApi()
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=staged, commit_message="Draft model with its report and card")
    except (HTTPError, OfflineModeIsEnabled, RuntimeError, ValueError) as error:
        answer = error.response if isinstance(error, HfHubHTTPError) else None
        reason = without_credentials(str(error)).strip().splitlines()[0]
        denied = answer is not None and answer.status_code in (401, 403)
        advice = "give a token with write access there in HF_TOKEN, or by `hf auth login`" if denied else "try again"
        raise DraftModelError(f"{repository}: {hub_address()} does not take the draft ({reason}); {advice}") from error
    return str(address)
