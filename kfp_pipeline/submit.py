"""Starts a run on a cluster: uploads the compiled pipeline as a version named by its content, and runs that version.

The version's name carries the hash of its content, so the same pipeline is uploaded once, whoever submits it; one that
GitOps applied under that name is used too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import redirect_stdout
from datetime import datetime
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import kfp_server_api

from draft_model.errors import DraftModelError, Problems
from draft_model.evaluation.prompts import BENCHMARKS
from draft_model.jobs.context import nodes_of, on_cluster
from draft_model.parameters import PARAMETERS, Parameters
from draft_model.parameters.rules import problems_with, valid_values
from draft_model.storage import is_remote
from kfp_pipeline.client import Server
from kfp_pipeline.compile import as_text, compile_documents, version_name
from kfp_pipeline.pipeline import NAME

logger = logging.getLogger(__name__)

EXPERIMENT = "draft-model"
SERVICE_ACCOUNT = "draft-model-steps"
_SHARED = ("storage_uri", "checkpoint_path")
_DATA = ("dataset_train_split", "dataset_validation_split", "evaluation_prompts")  # any scheme that fsspec knows
_URIS = [p.name for p in PARAMETERS if p.kind.startswith("uri_") or p.kind in ("custom_model", "mlflow_model")]


class Submitted(NamedTuple):
    """A run that a server has accepted."""

    run_id: str
    link: str  # to the UI


def submit(
    server: Server, values: Mapping[str, Any], *, experiment: str = EXPERIMENT, run_name: str = "",
    service_account: str = SERVICE_ACCOUNT,
) -> Submitted:  # fmt: skip
    """Starts a run of the pipeline with parameters by name; uploads the pipeline where the server does not have it.

    The experiment is made where it is missing; a run without a name has the target's and the time. DraftModelError
    tells all bad parameters at once, before any request, and what the server refuses.
    """
    parameters, documents = check(values), compile_documents()
    client, namespace, version = server.client, server.namespace or None, version_name(documents)
    pipeline_id, version_id = find_version(server, version)
    logger.info("pipeline: %s, %s", version, "already on the server" if version_id else "to be uploaded")
    if not pipeline_id:
        new = kfp_server_api.V2beta1Pipeline(name=NAME, display_name=NAME, namespace=namespace)
        pipeline_id = client.pipelines.pipeline_service_create_pipeline(new).pipeline_id
    if not version_id:
        names = {"name": version, "display_name": version, "pipelineid": pipeline_id}
        with TemporaryDirectory() as folder:
            file = Path(folder, "pipeline.yaml")
            file.write_text(as_text(documents), encoding="utf-8")
            version_id = client.pipeline_uploads.upload_pipeline_version(str(file), **names).pipeline_version_id
    source = parameters.huggingface_id or parameters.pytorch_model_path or parameters.mlflow_model_path
    run_name = run_name or f"{source.rstrip('/').rpartition('/')[2]} {datetime.now():%Y-%m-%d %H:%M:%S}"
    with redirect_stdout(StringIO()):  # kfp.Client prints links
        run_id = client.run_pipeline(
            client.create_experiment(experiment, namespace=namespace).experiment_id, run_name,
            pipeline_id=pipeline_id, version_id=version_id, service_account=service_account,
            # Typed, because the server compares them with the types of the pipeline's inputs.
            params={name: getattr(parameters, name) for name in values},
        ).run_id  # fmt: skip
    if not run_id:
        raise DraftModelError(f"--host: {server.host} accepted a run and named none: this is not KFP's API")
    return Submitted(run_id, server.run_link(run_id))


def find_version(server: Server, version: str) -> tuple[str, str]:
    """Ids of the pipeline and of its version; empty where the server does not have it."""
    equals = {"operation": 1, "key": "display_name"}
    pipeline, named = (json.dumps({"predicates": [{**equals, "stringValue": name}]}) for name in (NAME, version))
    pipelines = server.client.list_pipelines(namespace=server.namespace or None, filter=pipeline).pipelines
    if not pipelines:
        return "", ""
    pipeline_id = pipelines[0].pipeline_id
    versions = server.client.list_pipeline_versions(pipeline_id, filter=named).pipeline_versions
    return pipeline_id, versions[0].pipeline_version_id if versions else ""


def check(values: Mapping[str, Any]) -> Parameters:
    """Validates what can be known without the cluster; raises DraftModelError with all problems at once."""
    # Of parameters that are not valid, the defaults pass.
    parameters, problems = valid_values(values)[0], Problems(problems_with(values))
    if not parameters.compute_map:  # a cluster's own is not known here
        with problems.collect():
            nodes_of(parameters, jobs=parameters.training_backend != "local")
    given = {name: value.strip() for name, value in values.items() if isinstance(value, str)}
    backend, prompts = given.get("training_backend", ""), given.get("evaluation_prompts", "")
    problems += [problem for name in _URIS if (problem := _unreachable(name, given.get(name, ""), backend))]
    benchmarks = BENCHMARKS.keys() >= {name.strip().lower() for name in prompts.split(",")}
    if not benchmarks and (problem := _unreachable("evaluation_prompts", prompts, backend)):
        problems.append(f"{problem}, or name benchmarks: {', '.join(BENCHMARKS)}")
    problems.raise_all()
    return parameters


def _unreachable(name: str, uri: str, backend: str) -> str:
    """Why pods cannot reach a URI; empty where nothing speaks against it."""
    if not uri or uri.startswith(("models:/", "runs:/")) or (name in _DATA and "://" in uri):
        return ""
    try:
        if is_remote(uri):
            return ""
    except DraftModelError as error:
        return f"{name}: {error}"
    if name in _SHARED and backend != "local":
        return f"{name}: given {uri!r}; the steps are pods that share no folder: use a URI, such as s3://bucket/drafts"
    if not Path(uri).is_absolute():
        return f"{name}: given {uri!r}; pods see no folder of this machine: use a URI, such as s3://bucket/{uri}"
    if not on_cluster() and Path(uri).exists():
        return f"{name}: given {uri!r}, which is on this machine; pods do not see it: copy it to a URI they can read"
    return ""
