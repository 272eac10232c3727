"""What can be known to be wrong before any heavy step starts: parameters, and inputs that are not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.dataset.files import find
from draft_model.errors import DraftModelError
from draft_model.evaluation.prompts import check as check_prompts
from draft_model.parameters import STAGES, Parameters, Stage, problems_with

_DATA = ("dataset_train_split", "dataset_validation_split")
_FILES = (*_DATA, "draft_model_config")
_FOLDERS = ("pytorch_model_path", "mlflow_model_path", "resume_from_checkpoint")
_MARKERS = {"mlflow_model_path": "MLmodel", "resume_from_checkpoint": "config.json"}


def check(values: Mapping[str, Any], stages: Iterable[Stage] = STAGES) -> Parameters:
    """Validates parameters and looks for every input that they name.

    Args:
        values: parameters by name; those left out have their defaults.
        stages: the stages that will run.

    Raises:
        DraftModelError: with all problems at once.
    """
    problems = problems_with(values, stages)
    bad = {problem.partition(":")[0] for problem in problems}
    for name in (*_FILES, *_FOLDERS):
        uri = values.get(name)
        if isinstance(uri, str) and uri and name not in bad:
            problems += _missing(name, uri)
    if "train" in stages and "checkpoint_path" not in bad:
        problems += _nothing_to_resume(values)
    if isinstance(prompts := values.get("evaluation_prompts"), str) and "evaluate" in stages:
        problems += check_prompts(prompts)
    if problems:
        raise DraftModelError(problems)
    return Parameters.model_validate(dict(values))


def _nothing_to_resume(values: Mapping[str, Any]) -> list[str]:
    """Whether resume=true is bound to find nothing: a folder that runs share can be looked into before the run."""
    uri = values.get("checkpoint_path")
    if not isinstance(uri, str) or not uri:
        return []
    try:
        found = storage.exists(storage.join(uri, "checkpoints.json"))
    except DraftModelError as error:
        return [f"checkpoint_path: {problem}" for problem in error.problems]
    if found or values.get("resume") != "true" or values.get("resume_from_checkpoint"):
        return []
    return [
        f"resume: given 'true', but there is no checkpoint under checkpoint_path={uri}, and resume_from_checkpoint is "
        "not given: name one there, or use resume=false"
    ]


def _missing(name: str, uri: str) -> list[str]:
    if uri.startswith(("models:/", "runs:/")):
        return []
    try:
        if name in _DATA:
            find(uri)  # says that there is none
            return []
        if name == "pytorch_model_path":
            # In object storage the model may lie one level below, which the import finds by listing.
            if not storage.is_remote(uri):
                # Either says what is not there, and leaves a local one where it is.
                storage.contents_of(uri) if uri.endswith(".gguf") else storage.fetch_tree(uri, Path())
            return []
        wanted = storage.join(uri, _MARKERS[name]) if name in _MARKERS else uri
        return [] if storage.exists(wanted) else [f"{name}: given {uri!r}, but there is no {wanted}"]
    except DraftModelError as error:
        return [f"{name}: {problem}" for problem in error.problems]
