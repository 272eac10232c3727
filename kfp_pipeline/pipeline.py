"""The pipeline `pipeline_draft_model`: preflight, import, dataset, train, evaluate, and at the end a clean-up.

Its inputs are the records of `draft_model.parameters`, in their order. The first step validates them and gives each
stage those that it reads as one value. Big things pass between the steps as URIs in object storage, with an artifact
beside each for lineage. On a cluster each heavy stage is a job (`draft_model.jobs`) that its step coordinates, so that
a pod that cannot start ends the run with the reason: KFP itself would wait for ever.

KFP caches none of the steps. Import and data set look at what their inputs hold now, and use the result of the same
content and settings where the store has it whole: a changed file is seen, and a deleted result is made again.
"""

import inspect
from typing import Any

from kfp import dsl, kubernetes

from draft_model.jobs.cluster import ACCOUNT
from draft_model.jobs.context import ENGINE_IMAGE, IMAGE, STORE_VARIABLES
from draft_model.parameters import PARAMETERS
from draft_model.tracking import RUN
from kfp_pipeline.components.build_dataset import build_dataset
from kfp_pipeline.components.clean_up import clean_up
from kfp_pipeline.components.evaluate_draft_model import evaluate_draft_model
from kfp_pipeline.components.images import IMAGES
from kfp_pipeline.components.import_model import import_model
from kfp_pipeline.components.preflight import preflight
from kfp_pipeline.components.train_draft_model import train_draft_model

NAME = "pipeline-draft-model"
STORE = "draft-model-object-store"
"""ConfigMap of the object store: `endpoint`, `region`, and other variables by their own names; each may be absent."""
STORE_KEYS = {"AWS_ENDPOINT_URL": "endpoint", "AWS_DEFAULT_REGION": "region"}
HUB = "draft-model-hub"
"""Secret with the Hub's `token`, and ConfigMap with the `endpoint` of a mirror; without them, public models only."""
ASK_HUB = ("preflight", "import-model", "build-dataset", "evaluate-draft-model")
JOBS = "draft-model-coordinator"
"""Secret with the token of the account that may manage jobs. Every step gets it: preflight checks what it may, the
others start, follow and end jobs. None runs a model's or a user's code; their jobs' pods do, without a token."""
STEP = "draft-model/step"
"""Label of a step's pod: the name of its task."""
RETRY_SECONDS = 30 * 24 * 3600
"""Argo counts it from the first attempt's start, and kills what still runs then: longer than any training."""

COMPONENTS = (preflight, import_model, build_dataset, train_draft_model, evaluate_draft_model, clean_up)
OUTPUT, HANDLER, HANDLER_NAME = "output_model_path", "exit-handler-1", "train-a-draft-model"
"""The pipeline's output; the task of all steps but the clean-up, and the name under which the UI shows it."""


def _description() -> str:
    lines = ["Trains a draft model for speculative decoding of a target model.", ""]
    for parameter in PARAMETERS:
        unit = f" ({parameter.unit})" if parameter.unit else ""
        allowed = f" Allowed: {parameter.allowed}." if parameter.allowed else ""
        lines.append(f"{parameter.name}{unit}: {parameter.help}{allowed}")
    return "\n".join(lines)


def _pipeline(*values: Any) -> None:
    inputs = dict(zip((parameter.name for parameter in PARAMETERS), values, strict=True))
    run_id = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    shared = {name: inputs[name] for name in ("training_backend", "storage_uri", "checkpoint_path")}
    with dsl.ExitHandler(clean_up(run_id=run_id, **shared), name=HANDLER_NAME):
        plan = preflight(run_id=run_id, **inputs).outputs
        model = import_model(parameters=plan["model_import"], run_id=run_id)
        uris = {"model_uri": model.outputs["Output"]}
        dataset = build_dataset(parameters=plan["dataset"], run_id=run_id, **uris)
        uris["dataset_uri"] = dataset.outputs["Output"]
        trained = train_draft_model(parameters=plan["train"], run_id=run_id, **uris)
        draft = {"draft_uri": trained.outputs["Output"]}
        evaluated = evaluate_draft_model(parameters=plan["evaluate"], run_id=run_id, **uris, **draft)
    # They only coordinate: a step that was evicted is started again and takes its job over.
    for task, kind in ((model, "importer"), (dataset, "dataset"), (trained, "trainer"), (evaluated, "engine")):
        task.set_cpu_request("250m").set_memory_request("512Mi").set_env_variable(IMAGE, IMAGES[kind])
        task.set_retry(2, backoff_duration="10s", backoff_max_duration=f"{RETRY_SECONDS}s")
    dataset.set_env_variable(ENGINE_IMAGE, IMAGES["engine"])
    for task in dsl.pipeline_context.Pipeline.get_default_pipeline().tasks.values():
        task.set_caching_options(False)
        _set_up_pod(task, inputs["object_store_secret"])


def _set_up_pod(task: Any, secret: Any) -> None:
    """Access to the object store and the Hub, the run's id for tracking, the step's label, and never root."""
    keys = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
    kubernetes.use_secret_as_env(task, secret_name=secret, secret_key_to_env=keys, optional=True)
    store = {STORE_KEYS.get(name, name): name for name in STORE_VARIABLES}
    kubernetes.use_config_map_as_env(task, config_map_name=STORE, config_map_key_to_env=store, optional=True)
    kubernetes.use_secret_as_volume(task, secret_name=JOBS, mount_path=str(ACCOUNT), optional=True)
    if task.name in ASK_HUB:
        token, mirror = {"token": "HF_TOKEN"}, {"endpoint": "HF_ENDPOINT"}
        kubernetes.use_secret_as_env(task, secret_name=HUB, secret_key_to_env=token, optional=True)
        kubernetes.use_config_map_as_env(task, config_map_name=HUB, config_map_key_to_env=mirror, optional=True)
    kubernetes.use_field_path_as_env(task, RUN, "metadata.labels['pipeline/runid']")
    kubernetes.add_pod_label(task, STEP, task.name)
    kubernetes.set_security_context(task, run_as_non_root=True)


def _add_output(pipeline: Any) -> None:
    """Adds the trained model to the pipeline's outputs, as the contract has it.

    The SDK refuses to return what a task under an ExitHandler makes, and a server takes such an output without effect:
    people find the draft by the training step's artifact and by the output parameter of that step.
    """
    spec = pipeline.pipeline_spec
    model = spec.components["comp-train-draft-model"].output_definitions.artifacts[OUTPUT]
    for graph, task in ((spec.components[f"comp-{HANDLER}"], "train-draft-model"), (spec.root, HANDLER)):
        graph.output_definitions.artifacts[OUTPUT].CopyFrom(model)
        graph.dag.outputs.artifacts[OUTPUT].artifact_selectors.add(producer_subtask=task, output_artifact_key=OUTPUT)


_pipeline.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(
            each.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=each.default, annotation=each.type
        )
        for each in PARAMETERS
    ]
)
pipeline_draft_model = dsl.pipeline(name=NAME, description=_description())(_pipeline)
_add_output(pipeline_draft_model)
