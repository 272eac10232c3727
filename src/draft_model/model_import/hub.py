"""A repository of the Hugging Face Hub: what it holds at one commit, and its files, brought as they are needed.

HF_ENDPOINT names a mirror; the token is HF_TOKEN or the file that HF_TOKEN_PATH names, and goes to the Hub only.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from draft_model.errors import DraftModelError
from draft_model.hub import hub_address
from draft_model.storage import Content, LocalContent
from draft_model.storage.contents import Reader
from draft_model.storage.transfer import check_free_disk

logger = logging.getLogger(__name__)

_TRIES = 5
_PARTIAL_CONTENT = 206
Result = TypeVar("Result")


class Unreachable(DraftModelError):
    """The Hub does not answer from here; whether it has the repository is not known."""


@dataclass(frozen=True)
class HubContent:
    """A file of a repository; reading all of it downloads it, and takes it away again.

    Attributes:
        repository: `org/name`.
        commit: of the repository.
        name: of the file.
        size: bytes.
        stamp: the Git object's id.
        scratch: where it is downloaded to.
        sha256: of files in large-file storage; else empty.
        kept: whether it stays there, for whoever reads it again.
    """

    repository: str
    commit: str
    name: str
    size: int
    stamp: str
    scratch: Path
    sha256: str = ""
    kept: bool = False

    @property
    def on_disk(self) -> int:
        """Bytes that reading all of it takes up on this machine's disk."""
        return self.size

    def read(self, offset: int, length: int) -> bytes:
        """Some bytes, by a range request."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        url = hf_hub_url(self.repository, self.name, revision=self.commit)
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}

        def ask() -> bytes | None:
            with get_session().stream("GET", url, headers={**build_hf_headers(), **wanted}) as answer:
                hf_raise_for_status(answer)
                return bytes(answer.read()) if answer.status_code == _PARTIAL_CONTENT else None

        with _errors(self.repository):
            data = _going_on(self.name, ask)
        if data is not None:
            return data
        with self.open() as reader:  # a mirror that knows no ranges
            return reader(offset, length)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """For reading all of it: downloads it; a connection that ends is taken up again where it was."""
        path = self.scratch / self.name
        check_free_disk(self.scratch, self.size)
        _download(self.repository, self.commit, [self.name], self.scratch)
        try:
            with LocalContent(path).open() as reader:
                yield reader
        finally:
            if not self.kept:
                path.unlink(missing_ok=True)


def _going_on(what: str, work: Callable[[], Result]) -> Result:
    """Repeats what a broken connection cut; what the Hub itself refuses is not repeated."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    for attempt in range(1, _TRIES + 1):
        try:
            return work()
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) or attempt == _TRIES:
                raise
            logger.warning("the download of %s was cut (%s): going on", what, type(error).__name__)
    raise AssertionError


def _download(repository: str, commit: str, names: list[str], scratch: Path) -> None:
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    with _errors(repository):
        _going_on(
            ", ".join(names[:3]),
            lambda: snapshot_download(repository, revision=commit, local_dir=scratch, allow_patterns=patterns),
        )


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Says in words what the Hub refuses, and never the token."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    start = f"huggingface_id: {name} cannot be downloaded: "
    endpoint = hub_address()
    try:
        yield
    except GatedRepoError as error:
        raise DraftModelError(
            f"{start}it is gated; ask for access on its page, and give a token of that account in HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise DraftModelError(
            f"{start}{endpoint} knows no such repository, or it is private; check the name, and for a private one "
            "the token in HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise DraftModelError(f"{start}it has no such revision; give a branch, a tag or a commit") from error
    except HFValidationError as error:
        raise DraftModelError(f"{start}{_first_line(error)}; allowed: `org/name` or `org/name@revision`") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        advice = "check the token in HF_TOKEN" if status in (401, 403) else "try again later"
        raise DraftModelError(f"{start}{endpoint} answers with status {status}; {advice}") from error
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise Unreachable(
            f"{start}{endpoint} cannot be reached ({type(error).__name__}); check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE; run it again: large files that have reached the output are not downloaded again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def find(name: str, scratch: Path, seconds: float | None = None) -> tuple[str, dict[str, Content]]:
    """What a repository holds; downloads nothing yet.

    Args:
        name: `org/name` or `org/name@revision`.
        scratch: where its files are downloaded to.
        seconds: to wait for an answer; None: as long as the library does.

    Returns:
        The commit, and its files.

    Raises:
        DraftModelError: where it is missing or gated.
        Unreachable: where the Hub does not answer.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi

    repository, _, revision = name.partition("@")
    with _errors(name):
        info: Any = HfApi().model_info(repository, revision=revision or None, timeout=seconds, files_metadata=True)
    files: dict[str, Content] = {
        file.rfilename: HubContent(
            repository,
            str(info.sha),
            file.rfilename,
            int(file.size or 0),
            str(file.blob_id),
            scratch,
            str(file.lfs.sha256) if file.lfs else "",
        )
        for file in info.siblings
    }
    return str(info.sha), files


def bring(files: dict[str, Content], names: list[str]) -> dict[str, Content]:
    """Downloads small files, all by one call.

    Args:
        files: of `find`.
        names: those to bring.

    Returns:
        The files, with those that were brought on this disk.
    """
    chosen = [file for name in names if isinstance(file := files[name], HubContent)]
    if not chosen:
        return files
    first = chosen[0]
    check_free_disk(first.scratch, sum(file.size for file in chosen))
    _download(first.repository, first.commit, [file.name for file in chosen], first.scratch)
    return {**files, **{file.name: LocalContent(first.scratch / file.name) for file in chosen}}


def keep(content: Content) -> Content:
    """The same content, which stays on the disk once it was read: for one that is read in several goes."""
    return replace(content, kept=True) if isinstance(content, HubContent) else content
