"""What can be known to be wrong before any heavy step starts.

`check` looks at parameters and at every input that they name: the command line's door. `look` is the pipeline's first
step: it also asks the Hub, writes to the object store as the later steps will, and asks the cluster for what the
training job needs.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from draft_model import storage
from draft_model.dataset.files import find
from draft_model.errors import DraftModelError
from draft_model.evaluation import prompts
from draft_model.parameters import PARAMETERS, STAGES, Parameters, Stage
from draft_model.parameters.rules import problems_with
from draft_model.shown import bullets, table
from draft_model.storage.transfer import local_errors, run_all

_HUB_SECONDS = 10


@dataclass(frozen=True)
class Report:
    """What the first step has found.

    Attributes:
        given: the run's parameters by name.
        problems: what keeps the run from starting, a sentence each.
        notes: what is worth knowing, or could not be looked at from there.
    """

    given: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """What the KFP UI shows."""
        count = len(self.problems)
        said = f"# This run cannot start: {count} problem{'s' * (count != 1)}\n\n{bullets(self.problems)}\n"
        notes = f"## To know\n\n{bullets(self.notes)}\n" if self.notes else ""
        rows = [
            (name, self.given.get(name, default), "" if self.given.get(name, default) == default else default)
            for name, default in ((parameter.name, parameter.default) for parameter in PARAMETERS)
        ]
        run = f"## The run\n\n{table(rows, ('parameter', 'value', 'default, where it is another'))}"
        return (said if self.problems else "# All that the run names is there\n\n") + notes + run


def check(values: Mapping[str, Any], stages: Iterable[Stage] = STAGES) -> Parameters:
    """Validates parameters and looks for every input that they name.

    Args:
        values: parameters by name; those left out have their defaults.
        stages: the stages that will run.

    Raises:
        DraftModelError: with all problems at once.
    """
    stages = list(stages)
    problems = problems_with(values, stages)
    bad = {problem.partition(":")[0] for problem in problems}
    for name, reader in _READERS.items():
        uri = values.get(name)
        if isinstance(uri, str) and uri and name not in bad:
            problems += _problems(name, reader, uri)
    if values.get("checkpoint_path") and "train" in stages and "checkpoint_path" not in bad:
        problems += _problems("checkpoint_path", partial(_read_checkpoints, values), str(values["checkpoint_path"]))
    valid = Parameters.model_validate({name: value for name, value in values.items() if name not in bad})
    if valid.evaluation_prompts and "evaluate" in stages:
        reader = partial(_read_prompts, valid.evaluation_conversations)
        problems += _problems("evaluation_prompts", reader, valid.evaluation_prompts)
    if problems:
        raise DraftModelError(problems)
    return Parameters.model_validate(dict(values))


def look(values: Mapping[str, Any], root: str, work: Path) -> Report:
    """Looks at everything that a run in a cluster needs.

    Args:
        values: parameters by name.
        root: URI of the folder that this step's own artifacts go to; the run's others go beside it.
        work: scratch folder on this machine.
    """
    from draft_model.jobs.place import nodes_of

    report = Report(values)
    bad = {problem.partition(":")[0] for problem in problems_with(values, [])}
    valid = {name: value for name, value in values.items() if name not in bad}
    parameters = Parameters.model_validate(valid)
    nodes: dict[str, Any] = {}
    try:
        check(values)
    except DraftModelError as error:
        report.problems.extend(error.problems)
    try:
        nodes = nodes_of(valid)
    except DraftModelError as error:
        report.problems.extend(error.problems)
    _ask_hub(parameters, report, work)
    _ask_for_prompts(parameters, report)
    _try_store(parameters, root, report)
    _ask_cluster(parameters, nodes.get("train"), report)
    return report


def _ask_hub(parameters: Parameters, report: Report, work: Path) -> None:
    from draft_model.model_import import hub

    if not parameters.huggingface_id or any(problem.startswith("huggingface_id:") for problem in report.problems):
        return
    try:
        hub.find(parameters.huggingface_id, work, seconds=_HUB_SECONDS)
    except hub.Unreachable as error:
        report.notes.append(f"not looked at from here; the import's first, light step does: {error}")
    except DraftModelError as error:
        report.problems.extend(error.problems)


def _ask_for_prompts(parameters: Parameters, report: Report) -> None:
    """Benchmarks, which the Hub has; and whatever this pod may be let to where the evaluation's is not."""
    from draft_model.jobs.place import on_cluster

    given = parameters.evaluation_prompts
    if any(problem.startswith("evaluation_prompts:") for problem in report.problems):
        return
    benchmarks = prompts.to_fetch(given)
    problems, notes = prompts.ask_hub(benchmarks, _HUB_SECONDS)
    report.problems.extend(problems)
    report.notes.extend(notes)
    outside = benchmarks or given.partition("://")[0].lower() in ("https", "gs")
    if outside and on_cluster() and not problems and not notes:
        report.notes.append(
            "evaluation_prompts: found from here; the evaluation fetches them after the training, from its own pod: "
            "network policies must let the step evaluate-draft-model out, too; or give a file in the object store"
        )


def _try_store(parameters: Parameters, root: str, report: Report) -> None:
    """Writes, reads and removes an object, with the keys that the later steps get."""
    place = parameters.storage_uri or root
    secret = parameters.object_store_secret
    absent = f"this pod has no keys: there is no Secret {secret}, or it lacks accesskey and secretkey"
    keys = bool(os.environ.get("AWS_ACCESS_KEY_ID"))
    try:
        if not storage.is_remote(place):
            return
        probe = storage.join(place, f"preflight-{uuid.uuid4().hex}")
        storage.write_bytes(storage.join(probe, "probe"), b"written")
        storage.read_bytes(storage.join(probe, "probe"))
        storage.remove(probe)
    except DraftModelError as error:
        why = f"object_store_secret: given {secret!r}; {absent}" if not keys else ""
        name = "storage_uri" if parameters.storage_uri else "the pipeline root"
        report.problems.append(f"{name}: {place} cannot be written, read and cleared: {error}")
        report.problems.extend(filter(None, [why]))
        return
    if not keys:
        report.notes.append(f"object_store_secret: {absent}; the pods' own role is enough for {place}")


def _ask_cluster(parameters: Parameters, compute: Any, report: Report) -> None:
    from draft_model.jobs.place import wants_cluster

    if wants_cluster(parameters):
        from draft_model.jobs.ready import look as look_at_cluster

        problems, notes = look_at_cluster(parameters, compute)
        report.problems.extend(problems)
        report.notes.extend(notes)


def _problems(name: str, reader: Callable[[str, str], Any], uri: str) -> list[str]:
    try:
        with local_errors(uri):
            reader(name, uri)
    except DraftModelError as error:
        return [problem if problem.startswith(f"{name}:") else f"{name}: {problem}" for problem in error.problems]
    return []


def _read_data(name: str, uri: str) -> None:
    """A byte of each file: that it is listed does not mean that it can be read."""
    run_all(lambda file: file.read(0, 1), find(uri))


def _read_config(name: str, uri: str) -> None:
    file = storage.join(uri, "config.json") if name == "resume_from_checkpoint" else uri
    if not storage.exists(file):
        raise DraftModelError(f"given {uri!r}, but there is no {file}")
    try:
        content = json.loads(storage.read_bytes(file).decode("utf-8-sig"))
    except ValueError as error:
        raise DraftModelError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DraftModelError(f"{file} holds a JSON {type(content).__name__}; it must be an object")


def _read_checkpoints(values: Mapping[str, Any], name: str, uri: str) -> None:
    """What runs share can be looked into before the run: resume=true may be bound to find nothing."""
    found = storage.exists(storage.join(uri, "checkpoints.json"))
    if not found and values.get("resume") == "true" and not values.get("resume_from_checkpoint"):
        raise DraftModelError(
            f"given {uri!r} with resume='true', but there is no checkpoint there, and resume_from_checkpoint is not "
            "given: name one there, or use resume=false"
        )


def _read_prompts(limit: int, name: str, uri: str) -> None:
    """As many as the evaluation decodes: a line that is no prompt is not to be found after the training."""
    prompts.check(uri, limit)


def _read_model(name: str, uri: str) -> None:
    """Configuration and tokenizer, wherever the import finds them; what a registry keeps is left to the import."""
    if uri.startswith(("models:/", "runs:/")):
        return
    from draft_model.model_import.sources import resolve

    with TemporaryDirectory() as folder:
        source = resolve(Parameters.model_validate({name: uri}), Path(folder))
        source.bring(source.described_by)


_READERS: dict[str, Callable[[str, str], Any]] = {
    "pytorch_model_path": _read_model,
    "mlflow_model_path": _read_model,
    "dataset_train_split": _read_data,
    "dataset_validation_split": _read_data,
    "draft_model_config": _read_config,
    "resume_from_checkpoint": _read_config,
}
