"""Everything that can be known to be wrong before a heavy step starts.

`check` reads parameters and every input that they name: what a command line does. `inspect_run` is the pipeline's
first step: it also asks the Hub, writes to the object store as the later steps will, and asks the cluster for what the
jobs need.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from draft_model import storage
from draft_model.dataset.files import find
from draft_model.errors import DraftModelError, Problem, Problems, named_parameters
from draft_model.evaluation import prompts
from draft_model.jobs.compute import misfit, weights_of
from draft_model.jobs.context import check_cluster, nodes_of, on_cluster, wants_cluster
from draft_model.kubeflow import own_server_too_old
from draft_model.markdown import bullets, table
from draft_model.parameters import PARAMETERS, STAGES, Parameters, Stage
from draft_model.parameters.rules import MODEL_SOURCES, problems_with, valid_values
from draft_model.storage.transfer import in_parallel, local_errors

if TYPE_CHECKING:
    from draft_model.jobs.compute import Compute

_HUB_SECONDS = 10


@dataclass(frozen=True)
class Report:
    """What the first step finds."""

    values: Mapping[str, Any]  # the run's parameters
    problems: Problems = field(default_factory=Problems)  # what keeps the run from starting, a sentence each
    notes: list[str] = field(default_factory=list)  # what is worth knowing, or could not be checked from here
    nodes: dict[Stage, Compute] = field(default_factory=dict)  # that jobs' pods ask for; those of `_node_row`

    def markdown(self) -> str:
        """The page that the KFP UI shows."""
        count = len(self.problems)
        title = f"This run cannot start: {count} problem{'s' * (count != 1)}" if count else "This run can start"
        parts = [f"# {title}\n", bullets(self.problems)] if count else [f"# {title}\n"]
        if self.notes:
            parts += ["## Notes\n", bullets(self.notes)]
        if self.nodes:
            heads = ("pods", "CPUs", "memory", "GPUs", "node labels", "queue")
            parts += ["## Nodes\n", table(map(_node_row, self.nodes.items()), heads)]
        rows = [
            (p.name, value, "" if value == p.default else p.default)
            for p in PARAMETERS
            for value in [self.values.get(p.name, p.default)]
        ]
        parts += ["## Parameters\n", table(rows, ("parameter", "value", "default, where it is another"))]
        return "\n".join(parts)

    def has(self, parameter: str) -> bool:
        """Whether a problem is about this parameter."""
        return parameter in named_parameters(self.problems)


def _node_row(item: tuple[Stage, Compute]) -> tuple[str, ...]:
    stage, node = item
    labels = ", ".join(f"{key}={value}" for key, value in node.node_selector.items())
    gpus = f"{node.gpus} {node.gpu_resource}" if node.gpus else "none"
    pods = {"import": "import, dataset", "train": "train, regenerate"}.get(stage, stage)
    return pods, node.cpus, node.memory, gpus, labels, node.queue or "none"


def check(values: Mapping[str, Any], stages: Iterable[Stage] = STAGES) -> Parameters:
    """Validates parameters by name for the stages that will run, and reads every input that they name.

    Raises:
        DraftModelError: with all problems at once.
    """
    stages = list(stages)
    parameters, _ = valid_values(values)
    problems = Problems(problems_with(values, stages))
    readers = dict(_READERS)
    if "train" in stages:
        readers["checkpoint_path"] = partial(_read_checkpoints, parameters)
    if "evaluate" in stages:  # a line that is no prompt must not be found after the training
        readers["evaluation_prompts"] = lambda *_: prompts.check(parameters)
    bad = named_parameters(problems)
    for name, reader in readers.items():
        if (uri := getattr(parameters, name)) and name not in bad:
            with problems.collect(name), local_errors(uri):
                reader(name, uri)
    problems.raise_all()
    return parameters


def inspect_run(values: Mapping[str, Any], root: str, work: Path) -> Report:
    """Checks everything that a run on a cluster needs; `root` is the URI that this step's own artifacts go to."""
    parameters, wrong = valid_values(values)
    report = Report({**values, **parameters.model_dump(exclude=named_parameters(wrong))})
    with report.problems.collect():
        check(values)
    with report.problems.collect():
        report.nodes.update(nodes_of(parameters, jobs=wants_cluster(parameters)))
    report.notes.extend(dict.fromkeys(node.note for node in report.nodes.values() if node.note))
    if on_cluster() and not wants_cluster(parameters):
        report.notes.append(
            "training_backend: with 'local' each stage runs in the pod of its step, which must have the trainer's "
            "image: compute_* and instance_type_* choose no nodes, and a pod that cannot start waits for ever"
        )
    _inspect_target(parameters, report, work)
    _inspect_benchmarks(parameters, report)
    _inspect_store(parameters, root, report)
    if wants_cluster(parameters):
        problems, notes = check_cluster(parameters, report.nodes)
        report.problems.extend(problems)
        report.notes.extend(notes)
    if on_cluster() and (old := own_server_too_old()):
        report.problems.append(f"Kubeflow Pipelines: {old}")
    return report


def _inspect_target(parameters: Parameters, report: Report, work: Path) -> None:
    """Asks the Hub for the model; compares its size with the evaluation's node, and its positions with max_length."""
    from draft_model.drafts.base import check_proposals
    from draft_model.model_import import hub
    from draft_model.model_import.sources import Source, description, resolve
    from draft_model.training.plan import context_problem, draft_of

    sources = [name for name in MODEL_SOURCES if getattr(parameters, name)]
    if len(sources) != 1 or report.has(sources[0]) or parameters.mlflow_model_path.startswith(("models:/", "runs:/")):
        return
    config: Any = {}
    with report.problems.collect(sources[0]):
        try:
            if parameters.huggingface_id:
                listing = hub.find(parameters.huggingface_id, work / "hub", seconds=_HUB_SECONDS)
                paths = {name: name for name in listing.files}
                source = Source("huggingface_id", parameters.huggingface_id, listing, paths)
            else:
                source = resolve(parameters, work)
            prompts_given = parameters.evaluation_prompts and not report.has("evaluation_prompts")
            files = source.bring(description(source.paths) if prompts_given else source.paths.keys() & {"config.json"})
            if prompts_given:
                _inspect_prompts(parameters, files, work, report)
            config = json.loads(files["config.json"].read_text(encoding="utf-8")) if "config.json" in files else {}
        except hub.Unreachable as error:
            report.notes.append(f"huggingface_id: not checked from here, the import does: {error}")
        except (ValueError, RecursionError):  # the import says what is wrong with a config.json
            return
    if not config or not isinstance(config, dict):
        return
    if parameters.draft_model_config and not report.has("draft_model_config"):
        with report.problems.collect("draft_model_config"):
            note = check_proposals(draft_of(config, parameters), parameters.num_speculative_tokens)
            report.notes.extend(filter(None, [note]))
    if (node := report.nodes.get("evaluate")) and (weights := weights_of(config)):
        report.problems.extend(filter(None, [misfit(config, weights, 0.0, parameters, node)]))
    with suppress(AttributeError, TypeError):  # a configuration of an odd shape is left to the import
        report.notes.extend(filter(None, [context_problem(config, parameters.max_length)]))


def _inspect_prompts(parameters: Parameters, files: Mapping[str, Path], work: Path, report: Report) -> None:
    """Writes the prompts of files by the target's own chat template, which may refuse them."""
    from draft_model.dataset.encode import load_tokenizer
    from draft_model.workers import Workers

    folder = work / "tokenizer"
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    try:
        with Workers() as worker:  # nobody has looked at this model before
            tokenizer = worker.call(load_tokenizer, folder)
    except DraftModelError:  # the data set says what is wrong with a tokenizer
        return
    with report.problems.collect("evaluation_prompts"):
        prompts.check(parameters, tokenizer)


def _inspect_benchmarks(parameters: Parameters, report: Report) -> None:
    """Asks the Hub for benchmarks; and says what the evaluation's pod must reach where this one does."""
    if report.has("evaluation_prompts"):
        return
    benchmarks = prompts.to_fetch(parameters.evaluation_prompts)
    problems, notes = prompts.ask_hub(benchmarks, _HUB_SECONDS)
    report.problems.extend(problems)
    report.notes.extend(notes)
    outside = benchmarks or parameters.evaluation_prompts.partition("://")[0].lower() in ("https", "gs")
    if outside and on_cluster() and not problems and not notes:
        report.notes.append(
            "evaluation_prompts: found from here; the evaluation fetches them after the training, from its job's pod: "
            "network policies must let it out, too; or give a file in the object store"
        )


def _inspect_store(parameters: Parameters, root: str, report: Report) -> None:
    """Writes, reads and removes as the later steps will, with the keys that they get."""
    secret, keys = parameters.object_store_secret, bool(os.environ.get("AWS_ACCESS_KEY_ID"))
    absent = f"this pod has no keys: there is no Secret {secret}, or it lacks accesskey and secretkey"
    folders = {"storage_uri" if parameters.storage_uri else "the pipeline root": parameters.storage_uri or root}
    folders |= {"checkpoint_path": parameters.checkpoint_path} if parameters.checkpoint_path else {}
    remote = False
    for name, uri in folders.items():
        scheme = uri.partition("://")[0] if "://" in uri else ""
        if name == "the pipeline root" and (scheme not in ("", "file", "s3", "minio") or "?" in uri):
            report.problems.append(
                f"{name}: given {uri}; steps and training pods read and write s3:// and minio:// without a query: set "
                "storage_uri to such a URI, or change the pipeline root"
            )
            continue
        if report.has(name):
            continue
        try:
            if storage.is_remote(uri):
                remote = True
                if problems := storage.probe(uri, conditional=name == "checkpoint_path"):
                    raise DraftModelError(problems)
        except DraftModelError as error:
            several = "/private-artifacts/" in root and scheme == "minio"
            only = "private-artifacts/<namespace>/, private/<namespace>/, artifacts/ and shared/"
            reason = f"; where KFP serves several users, a namespace may only write under {only}" if several else ""
            report.problems.append(Problem(name, f"{uri} cannot be written, read and cleared: {error}{reason}"))
            if not keys and not report.has("object_store_secret"):
                report.problems.append(Problem("object_store_secret", f"given {secret!r}; {absent}"))
    if remote and not keys and not report.has("object_store_secret"):
        report.notes.append(f"object_store_secret: {absent}; the pods' own role is enough")


def _read_data(name: str, uri: str) -> None:
    """A byte of each file: a file that is listed may not be readable."""
    in_parallel(lambda file: file.read(0, 1), find(uri))


def _read_config(name: str, uri: str) -> None:
    from draft_model.training.plan import read_config

    file = storage.join(uri, "config.json") if name == "resume_from_checkpoint" else uri
    if not storage.exists(file):
        raise DraftModelError(f"given {uri!r}, but there is no {file}")
    read_config(file, name)


def _read_checkpoints(parameters: Parameters, name: str, uri: str) -> None:
    """A folder that runs share is there before the run: resume=true may be bound to find nothing."""
    there = storage.exists(storage.join(uri, "checkpoints.json"))
    if not there and parameters.resume == "true" and not parameters.resume_from_checkpoint:
        raise DraftModelError(
            f"given {uri!r} with resume='true', but there is no checkpoint there, and resume_from_checkpoint is not "
            "given: name one there, or use resume=false"
        )


def _read_model(name: str, uri: str) -> None:
    """Configuration and tokenizer, wherever the import finds them; a registry's models are left to the import."""
    if uri.startswith(("models:/", "runs:/")):
        return
    from draft_model.model_import.sources import description, resolve

    with TemporaryDirectory() as folder:
        source = resolve(Parameters.model_validate({name: uri}), Path(folder))
        source.bring(description(source.paths))


_READERS: dict[str, Callable[[str, str], Any]] = {
    "pytorch_model_path": _read_model,
    "mlflow_model_path": _read_model,
    "dataset_train_split": _read_data,
    "dataset_validation_split": _read_data,
    "draft_model_config": _read_config,
    "resume_from_checkpoint": _read_config,
}
