"""A repository of the Hugging Face Hub: what it holds at one commit, downloaded by huggingface_hub.

HF_ENDPOINT names a mirror; the token is HF_TOKEN or the file that HF_TOKEN_PATH names, and goes to the Hub only.
"""

from __future__ import annotations

import glob
import logging
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from draft_model.errors import DraftModelError, without_credentials
from draft_model.model_import.sources import File, Listing

logger = logging.getLogger(__name__)

TRIES, WAIT, LONGEST_WAIT = 6, 2.0, 60.0
"""Attempts of a request; seconds before the second, which double from then on."""
_BUSY = (408, 429, 500, 502, 503, 504)
Result = TypeVar("Result")


class Unreachable(DraftModelError):
    """The Hub does not answer from here, or is too busy; whether it has the repository is not known."""


def hub_address() -> str:
    """Where HF_ENDPOINT says the Hub is, without user and password."""
    from huggingface_hub import constants

    return without_credentials(constants.ENDPOINT)


def find(name: str, scratch: Path, seconds: float | None = None) -> Listing:
    """Lists a repository (`org/name` or `org/name@revision`) at one commit; raises Unreachable after `seconds`."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, snapshot_download

    repository, _, revision = name.partition("@")
    ask = partial(HfApi().model_info, repository, revision=revision or None, timeout=seconds, files_metadata=True)
    info = _request(name, ask, seconds)
    if not info.sha:
        raise DraftModelError(
            f"huggingface_id: {name} cannot be downloaded: {hub_address()} names no commit of it; give HF_ENDPOINT a "
            "mirror that answers as the Hub does"
        )
    files = {
        file.rfilename: File(file.size, str(file.blob_id or ""), str(file.lfs.sha256) if file.lfs else "")
        for file in info.siblings or []
    }

    def bring(names: Iterable[str]) -> dict[str, Path]:
        paths = {name: scratch / name for name in names}
        patterns = [glob.escape(name) for name in paths]
        get = partial(snapshot_download, repository, revision=info.sha, local_dir=scratch, allow_patterns=patterns)
        _request(name, get)
        if missing := [name for name, path in paths.items() if not path.is_file()]:
            raise DraftModelError(f"huggingface_id: {name} lacks {', '.join(missing)} at commit {info.sha}")
        return paths

    return Listing(files, bring, str(info.sha))


def _request(name: str, request: Callable[[], Result], seconds: float | None = None) -> Result:
    """Repeats a request that failed on the way, or that a busy Hub put off; says in words what the Hub refuses."""
    from huggingface_hub import errors

    began, attempt = time.monotonic(), 0
    while True:
        attempt += 1
        try:
            return request()
        except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError) as error:  # type: ignore[attr-defined]
            cause: Any = error.__cause__ or error if isinstance(error, errors.LocalEntryNotFoundError) else error
            answer = getattr(cause, "response", None) if isinstance(cause, errors.HfHubHTTPError) else None
            status, asked = (answer.status_code, answer.headers.get("Retry-After", "")) if answer else (0, "")
            pause = min(float(asked) if asked.isdecimal() else WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
            late = seconds is not None and time.monotonic() - began + pause > seconds
            if refusal := _refusal(cause, status):
                raise DraftModelError(f"huggingface_id: {name} cannot be downloaded: {refusal}") from error
            reason = f"answers with status {status}" if status else f"cannot be reached ({type(cause).__name__})"
            if late or attempt == TRIES or isinstance(cause, errors.OfflineModeIsEnabled):
                advice = "try again later" if status else "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
                told = f"huggingface_id: {name} cannot be downloaded: {hub_address()} {reason}; {advice}"
                raise Unreachable(told) from error
            logger.warning("%s: %s %s; trying again in %.0f s", name, hub_address(), reason, pause)
            time.sleep(pause)


def _refusal(cause: Exception, status: int) -> str:
    """Why the Hub will not give a repository, in words without token and password; empty where it may later."""
    from huggingface_hub import errors

    match cause:
        case errors.GatedRepoError():
            return "it is gated; ask for access on its page, and give a token of that account in HF_TOKEN"
        case errors.RepositoryNotFoundError():
            check = "check the name, and for a private one the token in HF_TOKEN"
            return f"{hub_address()} knows no such repository, or it is private; {check}"
        case errors.RevisionNotFoundError():
            return "it has no such revision; give a branch, a tag or a commit"
        case errors.HFValidationError():
            return f"{without_credentials(str(cause)).splitlines()[0]}; allowed: `org/name` or `org/name@revision`"
        case errors.FileMetadataError():
            needed = "headers that huggingface_hub needs (X-Repo-Commit, ETag)"
            return f"{hub_address()} leaves out {needed}; have the mirror or proxy pass them on"
    if status and status not in _BUSY:
        advice = "check the token in HF_TOKEN" if status in (401, 403) else "check HF_ENDPOINT"
        return f"{hub_address()} answers with status {status}; {advice}"
    return ""
