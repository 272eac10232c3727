"""Which nodes the steps get: computes and instance types become what Kubernetes asks for."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Markdown, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["coordinator"], install_kfp_package=False)
def resolve_compute(
    problems: list[str],
    summary: Output[Markdown],
    instance_type_model_import: str = "Standard_d12_v2",
    instance_type_draft_model_training: str = "Standard_nc24rs_v3",
    num_nodes_draft_model_training: int = 1,
    number_of_gpu_to_use_draft_model_training: int = 1,
    compute_model_import: str = "serverless",
    compute_draft_model_training: str = "serverless",
    training_backend: str = "auto",
    compute_map: str = "",
) -> NamedTuple("Nodes", [("cpu", str), ("memory", str), ("node_selector", dict), ("tolerations", list)]):  # type: ignore[valid-type]
    """Resolves the compute parameters by the compute map, and stops the run where the preflight found problems.

    KFP keeps nothing that a failing step has written but its log. So the preflight itself succeeds and shows what it
    found, and this step, which all others come after, fails with the same sentences.

    What the import's pod asks for goes to KFP, as strings, since its driver drops numbers. The training job's pods are
    rendered by its own step from the same map.

    Args:
        problems: that the preflight found.
        summary: what the pods of import and training ask for.
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
    given = {name: value for name, value in locals().items() if name not in ("problems", "summary")}
    from pathlib import Path

    from draft_model.doors import component
    from draft_model.errors import DraftModelError
    from draft_model.jobs.context import nodes_of
    from draft_model.shown import table

    with component("resolve-compute"):
        if problems:
            raise DraftModelError(problems)
        nodes = nodes_of(given)
        heads = ("", "CPUs", "memory", "GPUs", "node labels", "queue")
        rows = [
            (stage, node.cpus, node.memory, f"{node.gpus} {node.gpu_resource}" if node.gpus else "none",
             ", ".join(f"{key}={value}" for key, value in node.node_selector.items()), node.queue or "none")
            for stage, node in nodes.items()
        ]  # fmt: skip
        Path(summary.path).write_text(table(rows, heads), encoding="utf-8")
        found = nodes["import"]
    return (found.cpus, found.memory, found.node_selector, found.tolerations)
