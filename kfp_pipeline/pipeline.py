"""The pipeline `pipeline_draft_model`: import, dataset, train, evaluate, and whatever happens a clean-up.

Its inputs are the records of `draft_model.parameters`, in their order: the signature is made from them, so that a
parameter is written down once. Big things pass between the steps as URIs in object storage, with an artifact beside
each for lineage; no model ever crosses a coordinating pod.
"""

import inspect
from typing import Any

from kfp import dsl, kubernetes

from draft_model.jobs.context import IMAGE
from draft_model.parameters import PARAMETERS
from draft_model.tracking import RUN
from kfp_pipeline.components.build_dataset import build_dataset
from kfp_pipeline.components.clean_up import clean_up
from kfp_pipeline.components.encode_dataset import encode_dataset
from kfp_pipeline.components.evaluate_draft_model import evaluate_draft_model
from kfp_pipeline.components.images import IMAGES
from kfp_pipeline.components.import_model import import_model
from kfp_pipeline.components.import_tokenizer import import_tokenizer
from kfp_pipeline.components.plan_dataset import plan_dataset
from kfp_pipeline.components.preflight import preflight
from kfp_pipeline.components.resolve_compute import resolve_compute
from kfp_pipeline.components.train_draft_model import train_draft_model

NAME = "pipeline-draft-model"
STORE = "draft-model-object-store"
"""ConfigMap with the object store's `endpoint` and `region`; where it is absent, those of AWS."""
HUB = "draft-model-hub"
"""Secret with the Hub's `token`, and ConfigMap with the `endpoint` of a mirror; without them: what is public, there."""
ASK_HUB = ("preflight", "import-tokenizer", "import-model", "evaluate-draft-model")
STEP = "draft-model/step"
"""Label of a step's pod: the name of its task."""

CACHED = ("import-model", "encode-dataset", "build-dataset")
"""What depends on its inputs alone. All else looks at the moment: the cluster, the model's version, the data files."""

COMPONENTS = (
    preflight,
    resolve_compute,
    import_tokenizer,
    import_model,
    plan_dataset,
    encode_dataset,
    build_dataset,
    train_draft_model,
    evaluate_draft_model,
    clean_up,
)
OUTPUT, STEPS = "output_model_path", "exit-handler-1"


def _description() -> str:
    lines = ["Trains the EAGLE-3 draft model for speculative decoding of a target model.", ""]
    for parameter in PARAMETERS:
        unit = f" ({parameter.unit})" if parameter.unit else ""
        allowed = f" Allowed: {parameter.allowed}." if parameter.allowed else ""
        lines.append(f"{parameter.name}{unit}: {parameter.help}{allowed}")
    return "\n".join(lines)


def _pipeline(*values: Any) -> None:
    inputs = dict(zip((parameter.name for parameter in PARAMETERS), values, strict=True))
    left = clean_up(run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, **_given(clean_up, inputs))
    with dsl.ExitHandler(left):
        _steps(inputs)
    for task in dsl.pipeline_context.Pipeline.get_default_pipeline().tasks.values():
        _with_store(task, inputs["object_store_secret"])
        if task.name in ASK_HUB:
            _with_hub(task)
        _tracked(task)
        _confined(task)
        task.set_caching_options(task.name in CACHED)


def _given(step: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's inputs that a step takes, under the same names."""
    return {name: inputs[name] for name in inspect.signature(step.python_func).parameters if name in inputs}


def _steps(inputs: dict[str, Any]) -> None:
    """All that the clean-up comes after. Weights and data set need nothing of each other, and so go side by side."""
    run_id = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    checked = preflight(**_given(preflight, inputs))
    nodes = resolve_compute(problems=checked.outputs["Output"], **_given(resolve_compute, inputs))
    tokenizer = import_tokenizer(run_id=run_id, **_given(import_tokenizer, inputs)).after(nodes)
    imported = import_model(version=tokenizer.outputs["version"], **_given(import_model, inputs))
    dataset_uri = _dataset(tokenizer, inputs).outputs["Output"]
    folders = {"model_uri": _on_nodes(imported, nodes).outputs["Output"], "dataset_uri": dataset_uri}
    trained = train_draft_model(**folders, run_id=run_id, **_given(train_draft_model, inputs))
    # It only coordinates: one that was evicted is started again and takes its job over.
    trained.set_cpu_request("250m").set_memory_request("512Mi").set_retry(2, backoff_duration="10s")
    trained.set_env_variable(IMAGE, IMAGES["trainer"])
    evaluate_draft_model(**folders, draft_uri=trained.outputs["Output"], **_given(evaluate_draft_model, inputs))


def _dataset(tokenizer: Any, inputs: dict[str, Any]) -> Any:
    model = {"model_uri": tokenizer.outputs["uri"]}
    planned = plan_dataset(**model, model_version=tokenizer.outputs["version"], **_given(plan_dataset, inputs))
    parts = planned.outputs["Output"]
    with dsl.ParallelFor(parts) as part:
        encoded = encode_dataset(part=part, **_given(encode_dataset, inputs))
    uris = dsl.Collected(encoded.outputs["Output"])
    return build_dataset(**model, parts=parts, uris=uris, **_given(build_dataset, inputs))


def _on_nodes(task: Any, nodes: Any) -> Any:
    task.set_cpu_request(nodes.outputs["cpu"]).set_memory_request(nodes.outputs["memory"])
    kubernetes.add_node_selector_json(task, nodes.outputs["node_selector"])
    kubernetes.add_toleration_json(task, nodes.outputs["tolerations"])
    return task


def _with_store(task: Any, secret: Any) -> None:
    """Where the object store is and its keys, for a step that may need them; without them the pod's role counts."""
    keys = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
    kubernetes.use_secret_as_env(task, secret_name=secret, secret_key_to_env=keys, optional=True)
    place = {"endpoint": "AWS_ENDPOINT_URL", "region": "AWS_DEFAULT_REGION"}
    kubernetes.use_config_map_as_env(task, config_map_name=STORE, config_map_key_to_env=place, optional=True)


def _with_hub(task: Any) -> None:
    """Which Hub, and whose token, for a step that looks for a model or a benchmark there."""
    token, place = {"token": "HF_TOKEN"}, {"endpoint": "HF_ENDPOINT"}
    kubernetes.use_secret_as_env(task, secret_name=HUB, secret_key_to_env=token, optional=True)
    kubernetes.use_config_map_as_env(task, config_map_name=HUB, config_map_key_to_env=place, optional=True)


def _tracked(task: Any) -> None:
    """The run's id, under which the stages' runs in MLflow have one parent; not an input, so that caching goes on."""
    kubernetes.use_field_path_as_env(task, RUN, "metadata.labels['pipeline/runid']")


def _confined(task: Any) -> None:
    """Which step it is, for network policies (manifests/components/network-policy), and that it never runs as root."""
    kubernetes.add_pod_label(task, STEP, task.name)
    kubernetes.set_security_context(task, run_as_non_root=True)


def _signature() -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(each.name, kind, default=each.default, annotation=each.type) for each in PARAMETERS]
    )


def _give_output(pipeline: Any) -> None:
    """Makes the trained model the pipeline's output.

    The SDK refuses to return what a task under an ExitHandler gives. The pipeline's file has no such limit: the handler
    is a graph like any other, and a graph has outputs.
    """
    spec = pipeline.pipeline_spec
    model = spec.components["comp-train-draft-model"].output_definitions.artifacts[OUTPUT]
    for graph, task in ((spec.components[f"comp-{STEPS}"], "train-draft-model"), (spec.root, STEPS)):
        graph.output_definitions.artifacts[OUTPUT].CopyFrom(model)
        graph.dag.outputs.artifacts[OUTPUT].artifact_selectors.add(producer_subtask=task, output_artifact_key=OUTPUT)


_pipeline.__signature__ = _signature()  # type: ignore[attr-defined]
pipeline_draft_model = dsl.pipeline(name=NAME, description=_description())(_pipeline)
_give_output(pipeline_draft_model)
