"""The objects of a job: a PyTorchJob (training-operator 1.x), or a TrainJob and its runtime (Kubeflow Trainer 2.x).

Both have the same pods. A TrainJob's own field for overriding pods changed its name with every minor version, so each
job has a TrainingRuntime with the whole pod template, and its TrainJob only refers to it.
"""

from __future__ import annotations

from importlib.resources import files

import yaml

from draft_model.jobs.request import QUEUE, SPEC_HASH, JobRequest, Kind, Manifest, digest

WORK = "/tmp/draft-model"  # noqa: S108  in the only folder that the pods may write to
GRACE_SECONDS = 300  # see pod.yaml
PYTORCHJOB = Kind("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob")
_TRAINER = "trainer.kubeflow.org"
TRAINJOB = Kind(_TRAINER, "v1alpha1", "trainjobs", "TrainJob")
RUNTIME = Kind(_TRAINER, "v1alpha1", "trainingruntimes", "TrainingRuntime")
_KEPT_SECONDS = 86_400


def pytorchjob(request: JobRequest) -> list[Manifest]:
    """The PyTorchJob: one Master and N-1 Workers, or Workers only where the job is elastic."""
    template = pod_template(request, "pytorch")
    spec: Manifest = {
        "nprocPerNode": str(request.spec.processes),
        "runPolicy": {
            "cleanPodPolicy": "None",  # logs and exit codes of the pods are read after the end
            "ttlSecondsAfterFinished": _KEPT_SECONDS,
            "activeDeadlineSeconds": request.deadline,
            "backoffLimit": 0,
            # Kueue resumes the job; a queue that nothing manages must not start it.
            "suspend": bool(request.compute.queue),
        },
        "pytorchReplicaSpecs": {
            name: {"replicas": replicas, "restartPolicy": "Never", "template": template}
            for name, replicas in replicas_of(request).items()
        },
    }
    if request.compute.restarts:
        spec["elasticPolicy"] = {
            "minReplicas": request.spec.nodes,
            "maxReplicas": request.spec.nodes,
            "rdzvBackend": "c10d",
            "maxRestarts": request.compute.restarts,
        }
    return [_object(PYTORCHJOB, request, spec, digest([spec]))]


def replicas_of(request: JobRequest) -> dict[str, int]:
    """Pods of a PyTorchJob by replica type."""
    nodes = request.spec.nodes
    if request.compute.restarts:
        return {"Worker": nodes}
    return {"Master": 1, **({"Worker": nodes - 1} if nodes > 1 else {})}


def trainjob(request: JobRequest) -> list[Manifest]:
    """The TrainingRuntime and the TrainJob, in the order in which they are created."""
    replicated: Manifest = {
        "name": "node",
        "template": {
            # The trainer applies the nodes' command, size and ranks to this replicated job.
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {"backoffLimit": 0, "template": pod_template(request, "node")},
        },
    }
    jobset = {"failurePolicy": {"maxRestarts": request.compute.restarts}, "replicatedJobs": [replicated]}
    runtime = {"mlPolicy": {"numNodes": request.spec.nodes, "torch": {}}, "template": {"spec": jobset}}
    job: Manifest = {
        "runtimeRef": {"apiGroup": _TRAINER, "kind": RUNTIME.kind, "name": request.name},
        "trainer": {"numNodes": request.spec.nodes, "numProcPerNode": request.spec.processes},
        "activeDeadlineSeconds": request.deadline,
        "suspend": bool(request.compute.queue),
    }
    hashed = digest([runtime, job])
    return [_object(RUNTIME, request, runtime, hashed), _object(TRAINJOB, request, job, hashed)]


def _object(kind: Kind, request: JobRequest, spec: Manifest, hashed: str) -> Manifest:
    queue = {QUEUE: request.compute.queue} if request.compute.queue and kind != RUNTIME else {}
    metadata: Manifest = {
        "name": request.name,
        "namespace": request.namespace,
        "labels": {**request.labels(), **queue},
        "annotations": {SPEC_HASH: hashed},
    }
    if request.owner:
        metadata["ownerReferences"] = [request.owner]
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, "spec": spec}


def pod_template(request: JobRequest, container: str) -> Manifest:
    """The template of the job's pods: pod.yaml, and what differs between jobs; credentials by reference only.

    Args:
        request: of the job.
        container: the container's name that the operator looks for.
    """
    compute = request.compute
    template: Manifest = yaml.safe_load(files(__package__).joinpath("pod.yaml").read_text(encoding="utf-8"))
    template["metadata"]["labels"] |= request.labels()
    spec = template["spec"]
    optional = {
        "nodeSelector": compute.node_selector,
        "tolerations": compute.tolerations,
        "priorityClassName": compute.priority_class,
    }
    spec |= {name: value for name, value in optional.items() if value}
    (main,) = spec["containers"]
    main |= {"name": container, "image": request.image}
    main["command"].append(request.spec.module)
    # Memory and GPUs are the pod's own, idle CPUs anybody's.
    own = {"memory": compute.memory, **({compute.gpu_resource: str(compute.gpus)} if compute.gpus else {})}
    main["resources"] = {"requests": {"cpu": compute.cpus, **own}, "limits": own}
    values = {"DRAFT_MODEL_JOB": request.spec.config, **request.variables}
    if compute.gpus:
        values["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
    else:
        cpus = int(compute.cpus.removesuffix("m")) // 1000
        values["OMP_NUM_THREADS"] = str(max(1, cpus // request.spec.processes))
    main["env"] += [{"name": name, "value": value} for name, value in values.items()]
    main["env"] += [{"name": name, "valueFrom": {"secretKeyRef": key}} for name, key in request.login.items()]
    return template
