"""What a step was handed, looked at before it starts anything heavy.

KFP hands over the result of an earlier run where the inputs are the same, and does not look whether it is still there.
"""

from __future__ import annotations

from collections.abc import Mapping

from draft_model import storage
from draft_model.errors import DraftModelError


def check_handed(folders: Mapping[str, str]) -> None:
    """Refuses folders that are not there, or of which files are missing.

    Args:
        folders: URI by the stage that wrote the folder; no file but the manifests is read.

    Raises:
        DraftModelError: with all that is missing.
    """
    problems = [problem for stage, uri in folders.items() for problem in _problems(stage, uri)]
    if problems:
        raise DraftModelError(problems)


def _problems(stage: str, uri: str) -> list[str]:
    advice = (
        f"the {stage} stage's result may be an earlier run's, from KFP's cache, and deleted since: start the run again "
        "without the cache (draft-model submit --no-cache)"
    )
    try:
        manifest = storage.read_manifest(uri, stage=stage)
    except DraftModelError as error:
        return [f"{problem}; {advice}" for problem in error.problems]
    return [] if storage.is_whole(uri, manifest) else [f"{uri}: files are missing that its manifest names; {advice}"]
