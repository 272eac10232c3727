"""The pipeline `pipeline_draft_model`: import, dataset, train, evaluate.

Its inputs are the records of `draft_model.parameters`, in their order: the signature is made from them, so that a
parameter is written down once. Big things pass between the steps as URIs in object storage, with an artifact beside
each for lineage; no model ever crosses a coordinating pod.
"""

import inspect
from typing import Any, NamedTuple

from kfp import dsl, kubernetes

from draft_model.jobs.place import IMAGE
from draft_model.parameters import PARAMETERS, Stage, parameters_of
from kfp_pipeline.components.build_dataset import build_dataset
from kfp_pipeline.components.clean_up import clean_up
from kfp_pipeline.components.encode_dataset import encode_dataset
from kfp_pipeline.components.evaluate_draft_model import evaluate_draft_model
from kfp_pipeline.components.images import IMAGES
from kfp_pipeline.components.import_model import import_model
from kfp_pipeline.components.plan_dataset import plan_dataset
from kfp_pipeline.components.preflight import preflight
from kfp_pipeline.components.resolve_compute import resolve_compute
from kfp_pipeline.components.train_draft_model import train_draft_model

NAME = "pipeline-draft-model"
STORE = "draft-model-object-store"
"""ConfigMap with the object store's `endpoint` and `region`; where it is absent, those of AWS."""


class Outputs(NamedTuple):
    """What the pipeline gives back."""

    output_model_path: dsl.Model


def _description() -> str:
    lines = ["Trains the EAGLE-3 draft model for speculative decoding of a target model.", ""]
    for parameter in PARAMETERS:
        unit = f" ({parameter.unit})" if parameter.unit else ""
        allowed = f" Allowed: {parameter.allowed}." if parameter.allowed else ""
        lines.append(f"{parameter.name}{unit}: {parameter.help}{allowed}")
    return "\n".join(lines)


def _pipeline(*values: Any) -> Any:
    inputs = dict(zip((parameter.name for parameter in PARAMETERS), values, strict=True))

    def of(stage: Stage) -> dict[str, Any]:
        return {parameter.name: inputs[parameter.name] for parameter in parameters_of(stage)}

    storage_uri = inputs["storage_uri"]
    checked = preflight(**inputs).set_caching_options(False)
    nodes = _resolved(inputs).after(checked)
    imported = _on_nodes(import_model(**of("import"), storage_uri=storage_uri), nodes)
    model_uri = imported.outputs["Output"]
    planned = plan_dataset(
        model_uri=model_uri, **of("dataset"), dataset_pods=inputs["dataset_pods"], storage_uri=storage_uri
    ).set_caching_options(False)
    with dsl.ParallelFor(planned.output) as part:
        encoded = encode_dataset(part=part, **of("dataset"))
    built = build_dataset(
        model_uri=model_uri, parts=planned.output, uris=dsl.Collected(encoded.output), **of("dataset")
    )
    dataset_uri = built.outputs["Output"]
    trained = train_draft_model(
        model_uri=model_uri,
        dataset_uri=dataset_uri,
        run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        **of("train"),
        storage_uri=storage_uri,
    ).set_caching_options(False)
    # It only coordinates: one that was evicted is started again and takes its job over.
    trained.set_cpu_request("250m").set_memory_request("512Mi").set_retry(2, backoff_duration="10s")
    trained.set_env_variable(IMAGE, IMAGES["trainer"])
    left = clean_up(run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, training_backend=inputs["training_backend"])
    left.after(trained).ignore_upstream_failure().set_caching_options(False)
    evaluate_draft_model(
        model_uri=model_uri, dataset_uri=dataset_uri, draft_uri=trained.outputs["Output"], **of("evaluate")
    ).set_caching_options(False)
    for task in dsl.pipeline_context.Pipeline.get_default_pipeline().tasks.values():
        _with_store(task, inputs["object_store_secret"])
    return Outputs(output_model_path=trained.outputs["output_model_path"])


def _resolved(inputs: dict[str, Any]) -> Any:
    names = inspect.signature(resolve_compute.python_func).parameters
    return resolve_compute(**{name: inputs[name] for name in names}).set_caching_options(False)


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


def _signature() -> inspect.Signature:
    parameters = [
        inspect.Parameter(
            parameter.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=parameter.default,
            annotation=parameter.type,
        )
        for parameter in PARAMETERS
    ]
    return inspect.Signature(parameters, return_annotation=Outputs)


_pipeline.__signature__ = _signature()  # type: ignore[attr-defined]
pipeline_draft_model = dsl.pipeline(name=NAME, description=_description())(_pipeline)
