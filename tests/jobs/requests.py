"""Requests whose rendering is kept in golden files, and what else tests of the jobs share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from draft_model.jobs.compute import Compute, ComputeMap, built_in, resolve
from draft_model.jobs.spec import WORK, Job
from draft_model.parameters import Parameters
from draft_model.training import TrainConfig

RUN = "3f2c9a10-77b4-4f0e-9d0e-5d1f9c1b2a3d"
MAP = ComputeMap.model_validate(
    built_in().model_dump()
    | {
        "computes": {
            "cpu-pool": {"cpus": 2, "memory_gib": 6, "gpus": 0, "node_selector": {"pool": "cpu"}},
            "research": {"instance_type": "p5.48xlarge", "queue": "research", "priority_class": "low"},
            "spot": {"instance_type": "Standard_ND96isr_H100_v5", "restarts": 3},
            "of no type": {"instance_type": "nothing"},
            "of no size": {"cpus": 1},
        }
    }
)
OWNER = {
    "apiVersion": "argoproj.io/v1alpha1",
    "kind": "Workflow",
    "name": "pipeline-draft-model-x7k2p",
    "uid": "0b3f2b2e-6f0a-4a5e-8a8e-2d9d1f6a7c11",
    "controller": False,
    "blockOwnerDeletion": False,
}


def request(compute: Compute | None = None, **parameters) -> Job:
    """One attempt of a training whose inputs and output are in an object store."""
    p = Parameters(**parameters)
    uris = {name: f"s3://bucket/run/{name}" for name in ("model", "dataset", "output")}
    key = {"name": "mlpipeline-minio-artifact", "optional": True}
    return Job(
        stage="train",
        config=TrainConfig(**uris, work=Path(WORK), parameters=p, again=True).to_json(),
        uris=uris,
        output=uris["output"],
        parameters=p,
        check=list,
        nodes=p.num_nodes_draft_model_training,
        processes=p.number_of_gpu_to_use_draft_model_training,
        run_id=RUN,
        compute=compute or resolve(MAP, "train", p),
        image="registry.example/draft-model/stage@sha256:" + "ab" * 32,
        variables={"AWS_ENDPOINT_URL": "http://seaweedfs.kubeflow:9000", "AWS_DEFAULT_REGION": "us-east-1"},
        namespace="team",
        owner=OWNER,
        login={
            "AWS_ACCESS_KEY_ID": {**key, "key": "accesskey"}, "AWS_SECRET_ACCESS_KEY": {**key, "key": "secretkey"}
        },
    )  # fmt: skip


def _sized(nodes: int, gpus: int, **parameters) -> Job:
    world = {"num_nodes_draft_model_training": nodes, "number_of_gpu_to_use_draft_model_training": gpus}
    return request(**world, draft_global_batch_size=nodes * gpus, **parameters)


GOLDEN = {
    "1x1": _sized(1, 1),
    "1x8": _sized(1, 8, instance_type_draft_model_training="Standard_ND96isr_H100_v5"),
    "4x8": _sized(4, 8, instance_type_draft_model_training="a3-highgpu-8g"),
    "cpu-pool": _sized(2, 2, compute_draft_model_training="cpu-pool"),
    "elastic": _sized(2, 8, compute_draft_model_training="spot"),
    "queue": _sized(2, 8, compute_draft_model_training="research"),
}


def other_settings(wanted: Job) -> Job:
    """The same run, asked for something else."""
    return replace(wanted, config=wanted.config.replace('"seed": 0', '"seed": 1'))
