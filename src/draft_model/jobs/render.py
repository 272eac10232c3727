"""The objects of a job: a PyTorchJob (training-operator 1.x), or a TrainJob and its runtime (Kubeflow Trainer 2.x).

Both have the same pods. A TrainJob's own field for overriding pods changed its name with every minor version, so each
job has a TrainingRuntime with the whole pod template, and its TrainJob only refers to it.
"""

from __future__ import annotations

from draft_model.doors import ERROR_FILE
from draft_model.jobs.request import QUEUE, SPEC_HASH, JobRequest, Kind, Manifest, digest
from draft_model.jobs.torchrun import TERMINATION_LOG

SCRATCH = "/tmp"  # noqa: S108  the only folder that the processes may write to
WORK = f"{SCRATCH}/draft-model"
SERVICE_ACCOUNT = "draft-model-worker"
GRACE_SECONDS = 300  # a process that gets SIGTERM finishes its step and saves a checkpoint
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
    runtime: Manifest = {
        "mlPolicy": {"numNodes": request.spec.nodes, "torch": {}},
        "template": {"spec": jobset},
    }
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
    """The template of the job's pods; passes pod security's `restricted` level.

    Args:
        request: of the job.
        container: the container's name that the operator looks for.
    """
    compute = request.compute
    spec: Manifest = {
        "restartPolicy": "Never",
        "serviceAccountName": SERVICE_ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": container,
                "image": request.image,
                # torchrun reads nodes, ranks and the rendezvous from the variables that the operator sets.
                "command": ["python", "-m", "draft_model.jobs.torchrun", "-m", request.spec.module],
                "env": _environment(request),
                "resources": _resources(request),
                "terminationMessagePath": "/dev/termination-log",
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                    "readOnlyRootFilesystem": True,
                },
                "volumeMounts": [
                    {"name": "scratch", "mountPath": SCRATCH},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108
                ],
            }
        ],
        "volumes": [
            {"name": "scratch", "emptyDir": {}},
            # For NCCL and the data loader; counts as memory.
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if compute.node_selector:
        spec["nodeSelector"] = dict(compute.node_selector)
    if compute.tolerations:
        spec["tolerations"] = [dict(toleration) for toleration in compute.tolerations]
    if compute.priority_class:
        spec["priorityClassName"] = compute.priority_class
    return {
        "metadata": {
            "labels": {**request.labels(), "sidecar.istio.io/inject": "false"},
            "annotations": {"sidecar.istio.io/inject": "false", "karpenter.sh/do-not-disrupt": "true"},
        },
        "spec": spec,
    }


def _resources(request: JobRequest) -> Manifest:
    """Requests and limits: memory and GPUs are the pod's own, idle CPUs anybody's."""
    compute = request.compute
    own = {"memory": compute.memory, **({compute.gpu_resource: str(compute.gpus)} if compute.gpus else {})}
    return {"requests": {"cpu": compute.cpus, **own}, "limits": own}


def _environment(request: JobRequest) -> list[Manifest]:
    """Environment of the container; credentials by reference only."""
    values = {
        "DRAFT_MODEL_JOB": request.spec.config,
        ERROR_FILE: f"{WORK}/error.json",
        TERMINATION_LOG: "/dev/termination-log",
        "HOME": SCRATCH,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # torchrun copies what its processes print to the pod's log, each line with the process' rank.
        "PET_TEE": "3",
        "PET_LOG_DIR": f"{WORK}/logs",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${rank}] ",
    }
    if request.compute.gpus:
        values["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
    else:
        cpus = int(request.compute.cpus.removesuffix("m")) // 1000
        values["OMP_NUM_THREADS"] = str(max(1, cpus // request.spec.processes))
    values |= request.variables
    return [{"name": name, "value": value} for name, value in values.items()] + [
        {"name": name, "valueFrom": {"secretKeyRef": {**key}}} for name, key in request.login.items()
    ]
