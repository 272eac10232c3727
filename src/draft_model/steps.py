"""What the steps of the Kubeflow pipeline do: one function per component, without kfp.

A component of `kfp_pipeline` only calls its function here, with parameters by name, URIs, and KFP's artifacts to fill
in. An artifact's `uri` stays where KFP put it, because its launcher refuses any other; where the files really are is
in the artifact's metadata, in a README.md at the artifact's path, and travels as an output parameter.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from draft_model import storage
from draft_model.doors import step
from draft_model.errors import DraftModelError
from draft_model.parameters import PARAMETERS, STAGES, Parameters
from draft_model.shown import bullets

logger = logging.getLogger(__name__)


class Artifact(Protocol):
    """What the steps use of `kfp.dsl.Artifact` and its kinds."""

    uri: str
    metadata: dict[str, Any]

    @property
    def path(self) -> str:
        """Of the file or folder on this machine that KFP uploads to `uri`."""


def preflight(values: Mapping[str, Any], run_id: str, summary: Artifact) -> tuple[Any, ...]:
    """Checks the run and writes the page about it; no later step validates again.

    Args:
        values: all parameters by name; other names are ignored.
        run_id: of the pipeline's run.
        summary: the page.

    Returns:
        The parameters of import, dataset, train and evaluate, and CPUs, memory, node selector and tolerations of the
        pods of import and dataset.
    """
    from draft_model.preflight import inspect_run

    with step("preflight") as work:
        report = inspect_run({p.name: values[p.name] for p in PARAMETERS}, summary.uri.rpartition("/")[0], work)
        _write(summary, report.markdown())
        for note in report.notes:
            logger.info("%s", note)
        if report.problems:
            raise DraftModelError(report.problems)
        parameters, node = Parameters.model_validate(report.values), report.nodes["import"]
        stages = {stage: {**parameters.of_stage(stage), "storage_uri": parameters.storage_uri} for stage in STAGES}
        stages["dataset"] |= stages.pop("regenerate")  # one step runs both
    return (*stages.values(), node.cpus, node.memory, node.node_selector, node.tolerations)


def import_model(
    parameters: Mapping[str, Any], run_id: str, model: Artifact, summary: Artifact, metrics: Artifact
) -> str:
    """Imports the target, or finds it imported, and returns its URI."""
    from draft_model.model_import import ImportConfig, run

    with step("import") as work:
        p = Parameters.model_validate(parameters)
        result = run(ImportConfig(work=work, parameters=p, **_output(p, "model", model.uri, run_id)))
        _describe(
            model, result.uri, source=result.source, revision=result.revision, licence=result.licence,
            architecture=result.architecture, parameter_count=result.parameter_count, bytes=result.size,
        )  # fmt: skip
        _write(summary, result.markdown())
        _record(metrics, parameters=result.parameter_count, bytes=result.size)
    return result.uri


def build_dataset(
    parameters: Mapping[str, Any], run_id: str, model_uri: str, dataset: Artifact, report: Artifact, metrics: Artifact
) -> str:
    """Builds the data set for the target's tokenizer, or finds it built, and returns its URI.

    Where regenerate_answers is not off, it is made of the target's own answers.
    """
    from draft_model.dataset import REPORT_PAGE, DatasetConfig, run
    from draft_model.regenerate import RegenerateConfig
    from draft_model.regenerate import run as regenerate

    with step("dataset") as work:
        p = Parameters.model_validate(parameters)
        output = _output(p, "dataset", dataset.uri, run_id)
        if p.regenerate_answers != "off":
            uri = f"{output['output']}-answers"
            answers = regenerate(RegenerateConfig(model_uri, uri, p, work / "answers", output["root"]))
            p = p.model_copy(update={f"dataset_{split}_split": answers.split_uri(split) for split in answers.splits})
            _record(dataset, answers=answers.uri)
            _record(metrics, **answers.metrics())
        result = run(DatasetConfig(model=model_uri, work=work, parameters=p, **output))
        _describe(dataset, result.uri, fingerprint=result.fingerprint, chat_template=p.chat_template)
        _record(metrics, **result.metrics())
        Path(report.path).write_bytes(storage.read_bytes(storage.join(result.uri, REPORT_PAGE)))
    return result.uri


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
            format="EAGLE-3, for vLLM and SGLang",
        )  # fmt: skip
        _record(
            metrics, steps=result.steps, final_loss=result.loss, simulated_acceptance_length=result.acceptance_length
        )
    return result.final


def evaluate_draft_model(
    parameters: Mapping[str, Any], model_uri: str, dataset_uri: str, draft_uri: str,
    report: Artifact, card: Artifact, metrics: Artifact,
) -> None:  # fmt: skip
    """Measures the draft; its log ends with the result."""
    from draft_model.evaluation import EvaluateConfig, run

    with step("evaluate") as work:
        _check_inputs({"import": model_uri, "dataset": dataset_uri, "train": draft_uri})
        p = Parameters.model_validate(parameters)
        config = EvaluateConfig(model=model_uri, dataset=dataset_uri, final=draft_uri, work=work, parameters=p)
        result = run(config)
        shutil.copyfile(result.report, report.path)
        shutil.copyfile(result.card, card.path)
        if result.measured:
            shares = {f"acceptance_at_position_{k}": x for k, x in enumerate(result.acceptance_by_position, start=1)}
            _record(
                metrics, acceptance_length=result.acceptance_length, compared_tokens=result.compared_tokens,
                untrained_acceptance_length=result.untrained_acceptance_length, **shares,
            )  # fmt: skip
        logger.info("%s", evaluation_sentence(result))


def evaluation_sentence(result: Any) -> str:
    """The result of an evaluation, on one line."""
    if not result.measured:
        return f"acceptance length not measured: there was no prompt to decode; report beside {result.final}"
    return (
        f"acceptance length {result.acceptance_length:.2f} (untrained {result.untrained_acceptance_length:.2f}), "
        f"{result.compared_tokens} tokens equal to the target's own; report beside {result.final}"
    )


def clean_up(
    run_id: str, training_backend: str, storage_uri: str, checkpoint_path: str, status: Any, summary: Artifact
) -> None:
    """Deletes what the training step left on the cluster, and says how the run ended and how to go on.

    Args:
        run_id: of the pipeline's run, which is a label of its jobs.
        training_backend: the run's parameter.
        storage_uri: the run's parameter.
        checkpoint_path: the run's parameter.
        status: KFP's PipelineTaskFinalStatus of all steps together, in the words of MLMD (a server's) or of kfp.local.
        summary: the page that says so.
    """
    from draft_model import jobs

    with step("clean-up"):
        root, in_run, _ = summary.uri.partition(f"/{run_id}/")
        own = f"{storage_uri.rstrip('/')}/output_model_path" if storage_uri else f"{root}/{run_id}" if in_run else ""
        lines = jobs.clean_up(
            run_id, training_backend, state=status.state or "", message=status.error_message or "",
            checkpoint_path=checkpoint_path, root=own,
        )  # fmt: skip
        for line in lines:
            logger.info("%s", line)
        _write(summary, bullets(lines))


def _output(p: Parameters, name: str, artifact_uri: str, run_id: str) -> dict[str, str]:
    """The folder of this run that a stage writes to; and the one of all runs, where results are found again."""
    root, in_run, _ = artifact_uri.partition(f"/{run_id}/")
    output = storage.join(p.storage_uri, name) if p.storage_uri else artifact_uri
    return {"output": output, "root": p.storage_uri or (root if in_run else "")}


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


def _write(artifact: Artifact, text: str) -> None:
    Path(artifact.path).write_text(text, encoding="utf-8")
