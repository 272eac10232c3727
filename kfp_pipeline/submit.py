"""A run on a cluster: the compiled pipeline as a version of its content's name, and a run of it.

The version's name carries the hash of what it holds, so that the same pipeline is uploaded once, whoever submits it and
however often; the one that GitOps applied under that name counts too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kfp_server_api

from draft_model.errors import DraftModelError
from draft_model.evaluation.prompts import BENCHMARKS
from draft_model.jobs import compute
from draft_model.jobs.context import on_cluster
from draft_model.parameters import PARAMETERS, Parameters
from draft_model.parameters.rules import problems_with
from draft_model.storage import is_remote
from kfp_pipeline.client import TIMEOUT, Server, named
from kfp_pipeline.compile import as_text, compile_documents, version_name
from kfp_pipeline.pipeline import NAME

logger = logging.getLogger(__name__)

EXPERIMENT = "draft-model"
SERVICE_ACCOUNT = "draft-model-coordinator"
_CONFLICT = 409
_SHARED = ("storage_uri", "checkpoint_path")
_DATA = ("dataset_train_split", "dataset_validation_split", "evaluation_prompts")  # by any scheme that fsspec knows
_URIS = [p.name for p in PARAMETERS if p.kind.startswith("uri_") or p.kind in ("custom_model", "mlflow_model")]


@dataclass(frozen=True)
class Submitted:
    """A run that a server has taken.

    Attributes:
        run_id: of the run.
        link: where the UI shows it.
        version: name of the pipeline's version that it runs.
        uploaded: whether that version is new on the server.
    """

    run_id: str
    link: str
    version: str
    uploaded: bool


def submit(
    server: Server,
    values: Mapping[str, Any],
    *,
    cache: bool = True,
    experiment: str = EXPERIMENT,
    run_name: str = "",
    service_account: str = SERVICE_ACCOUNT,
) -> Submitted:
    """Starts a run of the pipeline, and uploads the pipeline where the server does not have it.

    Args:
        server: that is to run it.
        values: parameters by name; those left out have their defaults.
        cache: whether the import and the data set of an earlier run may be taken over.
        experiment: that lists the run; made where it is not there.
        run_name: shown in the UI; empty: the target's name and the time.
        service_account: of the run's pods.

    Raises:
        DraftModelError: for bad parameters, all at once and before the server is asked; and for what it refuses.
    """
    parameters = check(values)
    documents = compile_documents()
    version = version_name(documents)
    pipeline_id = _pipeline(server)
    version_id, uploaded = _version(server, pipeline_id, version, as_text(documents))
    logger.info("pipeline: %s, %s", version, "uploaded" if uploaded else "which the server had")
    run = kfp_server_api.V2beta1Run(
        experiment_id=_experiment(server, experiment),
        display_name=run_name or _name_of(parameters),
        pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=pipeline_id, pipeline_version_id=version_id
        ),
        # Typed, because the server compares them with the types of the pipeline's inputs.
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(
            parameters={name: getattr(parameters, name) for name in values}
        ),
        service_account=service_account,
    )
    with server.asked():
        run_id = server.client.runs.run_service_create_run(run, _request_timeout=TIMEOUT).run_id
    return Submitted(run_id, server.run_link(run_id), version, uploaded)


def check(values: Mapping[str, Any]) -> Parameters:
    """Validates what can be known without the cluster; the run's first step looks for the inputs themselves.

    Raises:
        DraftModelError: with all problems at once.
    """
    problems = problems_with(values)
    bad = {problem.partition(":")[0] for problem in problems}
    parameters = Parameters.model_validate({name: value for name, value in values.items() if name not in bad})
    problems += [problem for name in _URIS if (problem := _out_of_reach(name, parameters))]
    prompts = [name.strip().lower() for name in parameters.evaluation_prompts.split(",")]
    if not BENCHMARKS.keys() >= set(prompts) and (problem := _out_of_reach("evaluation_prompts", parameters)):
        problems.append(f"{problem}, or name benchmarks: {', '.join(BENCHMARKS)}")
    if not parameters.compute_map:  # a map of the cluster's own is not known here
        problems += _unknown_nodes(parameters)
    if problems:
        raise DraftModelError(problems)
    return parameters


def _out_of_reach(name: str, parameters: Parameters) -> str:
    """What is wrong with a place that pods are to reach; empty for nothing."""
    uri = getattr(parameters, name)
    if not uri or uri.startswith(("models:/", "runs:/")) or (name in _DATA and "://" in uri):
        return ""
    try:
        if is_remote(uri):
            return ""
    except DraftModelError as error:
        return f"{name}: {error}"
    if name in _SHARED and parameters.training_backend != "local":
        return f"{name}: given {uri!r}; the steps are pods that share no folder: use a URI, such as s3://bucket/drafts"
    if not Path(uri).is_absolute():
        return f"{name}: given {uri!r}; pods see no folder of this machine: use a URI, such as s3://bucket/{uri}"
    if not on_cluster() and Path(uri).exists():
        return f"{name}: given {uri!r}, which is on this machine; pods do not see it: copy it to a URI they can read"
    return ""


def _unknown_nodes(parameters: Parameters) -> list[str]:
    """What the built-in compute map does not have."""
    problems = []
    for stage in ("import", "train") if parameters.training_backend != "local" else ("import",):
        try:
            compute.resolve(compute.built_in(), stage, parameters)
        except DraftModelError as error:
            problems += error.problems
    return problems


def _name_of(parameters: Parameters) -> str:
    source = parameters.huggingface_id or parameters.pytorch_model_path or parameters.mlflow_model_path
    return f"{source.rstrip('/').rpartition('/')[2]} {datetime.now():%Y-%m-%d %H:%M:%S}"


def _pipeline(server: Server) -> str:
    pipelines, namespace = server.client.pipelines, server.namespace or None
    pipeline = kfp_server_api.V2beta1Pipeline(
        name=NAME,
        display_name=NAME,
        description="Trains the EAGLE-3 draft model for speculative decoding of a target model.",
        namespace=namespace,
    )
    found, _ = _found_or_made(
        server,
        f"pipeline {NAME}",
        lambda: (
            pipelines.pipeline_service_list_pipelines(
                namespace=namespace, filter=named(NAME), _request_timeout=TIMEOUT
            ).pipelines
        ),
        lambda: pipelines.pipeline_service_create_pipeline(pipeline, _request_timeout=TIMEOUT),
    )
    return str(found.pipeline_id)


def _version(server: Server, pipeline_id: str, name: str, text: str) -> tuple[str, bool]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        file.write_text(text, encoding="utf-8")
        found, made = _found_or_made(
            server,
            f"version {name} of the pipeline {NAME}",
            lambda: (
                server.client.pipelines.pipeline_service_list_pipeline_versions(
                    pipeline_id, filter=named(name), _request_timeout=TIMEOUT
                ).pipeline_versions
            ),
            lambda: server.client.pipeline_uploads.upload_pipeline_version(
                str(file), name=name, display_name=name, pipelineid=pipeline_id, _request_timeout=TIMEOUT
            ),
        )
    return str(found.pipeline_version_id), made


def _experiment(server: Server, name: str) -> str:
    experiments, namespace = server.client.experiments, server.namespace or None
    experiment = kfp_server_api.V2beta1Experiment(display_name=name, namespace=namespace)
    found, _ = _found_or_made(
        server,
        f"experiment {name}",
        lambda: (
            experiments.experiment_service_list_experiments(
                namespace=namespace, filter=named(name), _request_timeout=TIMEOUT
            ).experiments
        ),
        lambda: experiments.experiment_service_create_experiment(experiment, _request_timeout=TIMEOUT),
    )
    return str(found.experiment_id)


def _found_or_made(
    server: Server, what: str, find: Callable[[], list[Any] | None], make: Callable[[], Any]
) -> tuple[Any, bool]:
    """What is looked for, and whether it had to be made; one, even where two look at the same time."""
    with server.asked():
        if found := find():
            return found[0], False
        try:
            return make(), True
        except kfp_server_api.ApiException as error:
            if error.status != _CONFLICT:
                raise
        if found := find():  # somebody else was first
            return found[0], False
    where = f"the namespace {server.namespace!r}" if server.namespace else "its list"
    raise DraftModelError(
        f"{what}: {server.host} says that there is one, but does not show it in {where}: it may be another user's, or "
        "not belong to this pipeline; `kubectl get pipelines,pipelineversions -A` shows those of a cluster"
    )
