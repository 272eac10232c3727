"""Which nodes the steps get: computes and instance types become what Kubernetes asks for."""

from typing import NamedTuple

from kfp import dsl

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["coordinator"], install_kfp_package=False)
def resolve_compute(
    instance_type_model_import: str = "Standard_d12_v2",
    instance_type_draft_model_training: str = "Standard_nc24rs_v3",
    num_nodes_draft_model_training: int = 1,
    number_of_gpu_to_use_draft_model_training: int = 1,
    compute_model_import: str = "serverless",
    compute_draft_model_training: str = "serverless",
    training_backend: str = "auto",
    compute_map: str = "",
) -> NamedTuple("Nodes", [("cpu", str), ("memory", str), ("node_selector", dict), ("tolerations", list)]):  # type: ignore[valid-type]
    """Resolves the compute parameters by the compute map, and refuses what the map does not have.

    What the import's pod asks for goes to KFP, as strings, since its driver drops numbers. The training job's pods are
    rendered by its own step from the same map.

    Args:
        instance_type_model_import: Instance type of the import step when its compute is `serverless`.
        instance_type_draft_model_training: Instance type of the training job's pods when its compute is `serverless`.
        num_nodes_draft_model_training: Nodes (pods) of the training job.
        number_of_gpu_to_use_draft_model_training: GPUs per node.
        compute_model_import: `serverless`, or a named compute of the map.
        compute_draft_model_training: `serverless`, or a named compute of the map.
        training_backend: who trains; `local` needs no nodes of its own.
        compute_map: ConfigMap or file of the map; empty for the built-in one.

    Returns:
        CPU and memory requests, node selector and tolerations of the import step's pod.
    """
    given = dict(locals())
    from draft_model.doors import component
    from draft_model.jobs.place import nodes_of

    with component("resolve-compute"):
        nodes = nodes_of(given)
        for stage, node in nodes.items():
            print(f"{stage}: {node}")
        found = nodes["import"]
    return (found.cpus, found.memory, found.node_selector, found.tolerations)
