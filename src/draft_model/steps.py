"""What the steps of the Kubeflow pipeline do: one function per component, without kfp; and their jobs' processes.

A component of `kfp_pipeline` only calls its function here, with parameters by name, URIs, and KFP's artifacts to fill
in. On a cluster the step coordinates a job, whose pods run `python -m draft_model.steps`; elsewhere the stage runs in
the step. Both ways give the same result: what the step's artifacts and metrics show.

An artifact's `uri` stays where KFP put it, because its launcher refuses any other; where the files really are is in the
artifact's metadata, in a README.md at the artifact's path, and travels as an output parameter.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from draft_model import storage
from draft_model.entrypoint import exit_code, raise_on_sigterm, step
from draft_model.errors import DraftModelError
from draft_model.markdown import bullets
from draft_model.parameters import PARAMETERS, Parameters, Stage
from draft_model.processes import place_in_job

logger = logging.getLogger(__name__)

_ALL_STAGES = (
    "storage_uri", "training_backend", "training_attempts", "queue_limit", "start_limit", "run_limit", "compute_map",
    "object_store_secret", "compute_model_import", "instance_type_model_import", "compute_draft_model_training",
    "instance_type_draft_model_training", "number_of_gpu_to_use_draft_model_training", "max_length",
)  # fmt: skip
"""Parameters of jobs, their nodes and their folders, which every step reads besides its stage's."""
_FILES: dict[Stage, tuple[str, ...]] = {
    "import": ("pytorch_model_path", "mlflow_model_path"),
    "regenerate": ("dataset_train_split", "dataset_validation_split"),
    "dataset": ("dataset_train_split", "dataset_validation_split", "draft_model_config"),
    "evaluate": ("evaluation_prompts",),
}
"""Parameters that may name files of this machine, where no pod sees them."""


class Artifact(Protocol):
    """What the steps use of `kfp.dsl.Artifact` and its kinds."""

    uri: str
    metadata: dict[str, Any]

    @property
    def path(self) -> str:
        """Of the file or folder on this machine that KFP uploads to `uri`."""


def preflight(values: Mapping[str, Any], run_id: str, summary: Artifact) -> tuple[dict[str, Any], ...]:
    """Checks the run, all of whose parameters are in `values`, and writes the page about it.

    Returns:
        The parameters of import, dataset, train and evaluate, as far as they are not the defaults: KFP keeps several
        copies of what passes between steps. No later step validates them again.
    """
    from draft_model.preflight import inspect_run

    with step("preflight") as work:
        report = inspect_run({p.name: values[p.name] for p in PARAMETERS}, summary.uri.rpartition("/")[0], work)
        Path(summary.path).write_text(report.markdown(), encoding="utf-8")
        for note in report.notes:
            logger.info("%s", note)
        if report.problems:
            raise DraftModelError(report.problems)
        given = Parameters.model_validate(report.values)
        steps: tuple[set[Stage], ...] = ({"import"}, {"regenerate", "dataset"}, {"train"}, {"evaluate"})
        return tuple(
            {
                p.name: getattr(given, p.name)
                for p in PARAMETERS
                if (stages & {*p.stages} or p.name in _ALL_STAGES) and getattr(given, p.name) != p.default
            }
            for stages in steps
        )


def import_model(
    parameters: Mapping[str, Any], run_id: str, model: Artifact, summary: Artifact, metrics: Artifact
) -> str:
    """Imports the target, or finds it imported, and returns its URI."""
    with step("import") as work:
        p = Parameters.model_validate(parameters)
        result = _perform("import", p, _output(p, "model", model.uri, run_id), run_id, work)
        _describe(model, result["uri"], **result["metadata"])
        Path(summary.path).write_text(result["page"], encoding="utf-8")
        _record(metrics, **result["metrics"])
    return str(result["uri"])


def build_dataset(
    parameters: Mapping[str, Any], run_id: str, model_uri: str, dataset: Artifact, report: Artifact, metrics: Artifact
) -> str:
    """Builds the data set for the target's tokenizer, or finds it built, and returns its URI.

    Where regenerate_answers is not off, it is made of the target's own answers.
    """
    with step("dataset") as work:
        p = Parameters.model_validate(parameters)
        if p.regenerate_answers != "off":
            uris = {"model": model_uri, **_output(p, "answers", f"{dataset.uri}-answers", run_id)}
            answers = _perform("regenerate", p, uris, run_id, work)
            p = p.model_copy(update=answers["parameters"])
            _record(dataset, answers=answers["uri"])
            _record(metrics, **answers["metrics"])
        uris = {"model": model_uri, **_output(p, "dataset", dataset.uri, run_id)}
        result = _perform("dataset", p, uris, run_id, work)
        _describe(dataset, result["uri"], **result["metadata"])
        _record(metrics, **result["metrics"])
        Path(report.path).write_bytes(storage.read_bytes(result["report"]))
    return str(result["uri"])


def train_draft_model(
    parameters: Mapping[str, Any], run_id: str, model_uri: str, dataset_uri: str, draft: Artifact, metrics: Artifact
) -> str:
    """Runs the training job, and returns the URI of the checkpoint that is ready to serve."""
    from draft_model import jobs
    from draft_model.training import TrainConfig

    with step("train") as work:
        _check_inputs({"import": model_uri, "dataset": dataset_uri})
        p = Parameters.model_validate(parameters)
        uri = storage.join(p.storage_uri, "output_model_path") if p.storage_uri else draft.uri
        config = TrainConfig(model=model_uri, dataset=dataset_uri, output=uri, work=work, parameters=p)
        result = jobs.run(config, run_id)
        storage.read_manifest(result.final, stage="train")
        _describe(
            draft, result.output, final=result.final, checkpoints=config.checkpoints,
            format=f"{p.draft_architecture}, for vLLM and SGLang",
        )  # fmt: skip
        _record(
            metrics, steps=result.steps, final_loss=result.loss, simulated_acceptance_length=result.acceptance_length
        )
    return result.final


def evaluate_draft_model(
    parameters: Mapping[str, Any], run_id: str, model_uri: str, dataset_uri: str, draft_uri: str,
    report: Artifact, card: Artifact, metrics: Artifact,
) -> None:  # fmt: skip
    """Measures the draft; its log ends with the result."""
    with step("evaluate") as work:
        _check_inputs({"import": model_uri, "dataset": dataset_uri, "train": draft_uri})
        p = Parameters.model_validate(parameters)
        uris = {"model": model_uri, "dataset": dataset_uri, "draft": draft_uri}
        if misfit := _misfit(p, model_uri, draft_uri):
            raise DraftModelError([misfit, f"the draft in {draft_uri} is whole and can be served; it was not measured"])
        result = _perform("evaluate", p, uris, run_id, work, beside=draft_uri.rstrip("/").rpartition("/")[0])
        for artifact, name in ((report, "report.html"), (card, "README.md")):
            Path(artifact.path).write_bytes(storage.read_bytes(storage.join(draft_uri, name)))
        _record(metrics, **result["metrics"])
        logger.info("%s", result["sentence"])


def _misfit(p: Parameters, model_uri: str, draft_uri: str) -> str:
    """Why the evaluation's node cannot hold the target; empty where it can, where that is not known, and elsewhere."""
    from draft_model.jobs.compute import misfit
    from draft_model.jobs.context import nodes_of, wants_cluster

    if (node := nodes_of(p, jobs=wants_cluster(p)).get("evaluate")) is None:
        return ""
    model, draft = storage.read_manifest(model_uri, stage="import"), storage.read_manifest(draft_uri)
    files, drafts = (
        sum(file.size for file in manifest.files if file.path.endswith(".safetensors")) for manifest in (model, draft)
    )
    count = 0 if model.properties.get("quantization") else model.properties.get("parameter_count", 0)
    config = json.loads(storage.read_bytes(storage.join(model_uri, "config.json")))
    return misfit(config, 2.0 * count if count else files, drafts, p, node)


def clean_up(
    run_id: str, training_backend: str, storage_uri: str, checkpoint_path: str, status: Any, summary: Artifact
) -> None:
    """Deletes what the steps left on the cluster, and says how the run ended and how to go on.

    `status` is KFP's PipelineTaskFinalStatus of all steps together, in the words of MLMD (a server's) or of kfp.local.
    """
    from draft_model.jobs.cleanup import clean_up

    with step("clean-up"):
        root, in_run, _ = summary.uri.partition(f"/{run_id}/")
        own = f"{storage_uri.rstrip('/')}/output_model_path" if storage_uri else f"{root}/{run_id}" if in_run else ""
        lines = clean_up(
            run_id, training_backend, state=status.state or "", message=status.error_message or "",
            checkpoint_path=checkpoint_path, root=own,
        )  # fmt: skip
        for line in lines:
            logger.info("%s", line)
        Path(summary.path).write_text(bullets(lines), encoding="utf-8")


def _output(p: Parameters, name: str, artifact_uri: str, run_id: str) -> dict[str, str]:
    """The folder of this run that a stage writes to; and the one of all runs, where results are found again."""
    root, in_run, _ = artifact_uri.partition(f"/{run_id}/")
    output = storage.join(p.storage_uri, name) if p.storage_uri else artifact_uri
    return {"output": output, "root": p.storage_uri or (root if in_run else "")}


def _perform(
    stage: Stage, p: Parameters, uris: Mapping[str, str], run_id: str, work: Path, beside: str = ""
) -> dict[str, Any]:
    """A stage's result, by a job where there is a cluster for it, else by this process.

    Where an input is a file of this machine, which no pod of a cluster sees, it runs here, too. A job's record, logs
    and result go `beside` what it writes, or else into a folder of the run, since two runs may write there at once.
    """
    from draft_model import jobs
    from draft_model.jobs.context import wants_cluster

    files = {name: getattr(p, name) for name in _FILES.get(stage, ())}
    here = [name for name, value in files.items()
            if value.startswith("file:") or (":/" not in value and ("/" in value or "." in value))]  # fmt: skip
    if wants_cluster(p) and not here:
        root = uris.get("root")
        beside = beside or (storage.join(root, "jobs", run_id) if root else uris["output"])
        nodes = p.num_nodes_draft_model_training if stage == "regenerate" else 1
        return jobs.run_stage(stage, p, {name: uri for name, uri in uris.items() if uri}, beside, run_id, work, nodes)
    if importlib.util.find_spec("transformers") is None:
        if here:
            raise jobs.coordinates_only(f"{here[0]}: given {files[here[0]]!r}, which no job's pod sees", "a URI")
        raise jobs.coordinates_only("training_backend: given 'local'", "pytorchjob or trainjob")
    return {"run_id": run_id, **RUNS[stage](p, work, **uris)}


def _run_import(p: Parameters, work: Path, **uris: str) -> dict[str, Any]:
    from draft_model.model_import import ImportConfig, run

    result = run(ImportConfig(work=work, parameters=p, **uris))
    metadata = {name: getattr(result, name)
                for name in ("source", "revision", "licence", "architecture", "parameter_count")}  # fmt: skip
    return {
        "uri": result.uri, "written_by": "import", "page": result.markdown(),
        "metadata": {**metadata, "bytes": result.size},
        "metrics": {"parameters": result.parameter_count, "bytes": result.size},
    }  # fmt: skip


def _run_regenerate(p: Parameters, work: Path, **uris: str) -> dict[str, Any]:
    from draft_model.regenerate import RegenerateConfig, run

    result = run(RegenerateConfig(uris["model"], uris["output"], p, work, uris.get("root", "")))
    return {
        "uri": result.uri, "written_by": "regenerate", "metrics": result.metrics(),
        "parameters": {f"dataset_{split}_split": result.split_uri(split) for split in result.splits},
    }  # fmt: skip


def _run_dataset(p: Parameters, work: Path, **uris: str) -> dict[str, Any]:
    from draft_model.dataset import REPORT_PAGE, DatasetConfig, run

    result = run(DatasetConfig(work=work, parameters=p, **uris))
    return {
        "uri": result.uri, "written_by": "dataset", "report": storage.join(result.uri, REPORT_PAGE),
        "metadata": {"fingerprint": result.fingerprint, "chat_template": p.chat_template},
        "metrics": result.metrics(),
    }  # fmt: skip


def _run_evaluate(p: Parameters, work: Path, **uris: str) -> dict[str, Any]:
    from draft_model.evaluation import EvaluateConfig, run

    result = run(EvaluateConfig(work=work, parameters=p, final=uris.pop("draft"), **uris))
    said = "acceptance length not measured: there was no prompt to decode"
    if its := result.metrics:
        lengths = "acceptance length {acceptance_length:.2f} (untrained {untrained_acceptance_length:.2f})"
        said = lengths.format_map(its) + f", {its['compared_tokens']} tokens equal to the target's own"
    return {
        "uri": result.final, "written_by": "train", "metrics": dict(result.metrics),
        "sentence": f"{said}; report beside {result.final}",
    }  # fmt: skip


RUNS: dict[Stage, Callable[..., dict[str, Any]]] = {
    "import": _run_import, "regenerate": _run_regenerate, "dataset": _run_dataset, "evaluate": _run_evaluate,
}  # fmt: skip
"""What the process of a stage runs: its result is what the step shows, and the manifest's folder and stage."""


def _check_inputs(folders: Mapping[str, str]) -> None:
    """Refuses folders, by the stage that wrote them, that are gone or of which files are missing."""
    from draft_model import jobs

    lacking = [(stage, problem) for stage, uri in folders.items() for problem in jobs.lacking(uri, stage)]
    if lacking:
        raise DraftModelError(
            [f"{problem}; the {stage} step makes it again in a new run" for stage, problem in lacking]
        )


def _describe(artifact: Artifact, uri: str, **metadata: Any) -> None:
    """Names the real folder in an artifact's metadata, and in a README where KFP's artifact page leads elsewhere."""
    _record(artifact, uri=uri, **metadata)
    if uri != artifact.uri:
        folder = Path(artifact.path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(f"The files are in {uri}\n", encoding="utf-8")


def _record(artifact: Artifact, **values: Any) -> None:
    """Adds metadata, which is what KFP's metrics are too; None and NaN would fail the step, and are left out."""
    for name, value in values.items():
        if not _is_storable(value):
            logger.warning("%s is %s, and not recorded", name, value)
            continue
        artifact.metadata[name] = value


def _is_storable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_storable, value.values()))
    if isinstance(value, Iterable) and not isinstance(value, str):
        return all(map(_is_storable, value))
    return value is not None and not (isinstance(value, Real) and not math.isfinite(value))


def main() -> int:
    """`python -m draft_model.steps`: the process of a job's pod; DRAFT_MODEL_JOB says which stage it runs."""
    from draft_model.jobs.torchrun import tell_kubernetes

    def work() -> None:
        raise_on_sigterm()
        job = json.loads(os.environ["DRAFT_MODEL_JOB"])
        folder = Path(job["work"], job["stage"])
        folder.mkdir(parents=True, exist_ok=True)
        result = RUNS[job["stage"]](Parameters.model_validate(job["parameters"]), folder, **job["uris"])
        if place_in_job()[0] == 0:
            storage.write_bytes(job["result"], json.dumps({**result, "run_id": job["run_id"]}).encode())

    if code := exit_code(work):
        tell_kubernetes()
    return code


if __name__ == "__main__":
    sys.exit(main())
