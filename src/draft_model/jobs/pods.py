"""The pod template that all Kubernetes back ends share."""

from __future__ import annotations

from draft_model.doors import ERROR_FILE
from draft_model.jobs.request import JobRequest, Manifest
from draft_model.jobs.torchrun import TERMINATION_LOG

SCRATCH = "/tmp"  # noqa: S108  the only place that the processes may write to
WORK = f"{SCRATCH}/draft-model"
SERVICE_ACCOUNT = "draft-model-worker"
COMMAND = ["python", "-m", "draft_model.jobs.torchrun", "-m", "draft_model.training"]
"""Of every pod alike: torchrun reads nodes, ranks and the meeting point from the variables the operator sets."""


def pod_template(request: JobRequest, container: str) -> Manifest:
    """The template of the job's pods; passes pod security's `restricted` level.

    Args:
        request: what is asked for.
        container: the container's name that the operator looks for.
    """
    return {
        "metadata": {
            "labels": {**request.labels(), "sidecar.istio.io/inject": "false"},
            "annotations": {"sidecar.istio.io/inject": "false", "karpenter.sh/do-not-disrupt": "true"},
        },
        "spec": pod_spec(request, container),
    }


def pod_spec(request: JobRequest, container: str) -> Manifest:
    """The `spec` of the pods."""
    compute = request.compute
    spec: Manifest = {
        "restartPolicy": "Never",
        "serviceAccountName": SERVICE_ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # A process that is asked to stop finishes its step and saves a checkpoint.
        "terminationGracePeriodSeconds": 300,
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
                "command": COMMAND,
                "env": environment(request),
                "resources": resources(request),
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
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory"},
            },  # NCCL's and the data loader's; counts as memory
        ],
    }
    if compute.node_selector:
        spec["nodeSelector"] = dict(compute.node_selector)
    if compute.tolerations:
        spec["tolerations"] = [dict(toleration) for toleration in compute.tolerations]
    if compute.priority_class:
        spec["priorityClassName"] = compute.priority_class
    return spec


def resources(request: JobRequest) -> Manifest:
    """Requests and limits: memory and GPUs are the pod's own, idle CPUs anybody's."""
    compute = request.compute
    own = {"memory": compute.memory, **({compute.gpu_resource: str(compute.gpus)} if compute.gpus else {})}
    return {"requests": {"cpu": compute.cpus, **own}, "limits": own}


def environment(request: JobRequest) -> list[Manifest]:
    """Environment of the container; credentials by reference only."""
    values = {
        "DRAFT_MODEL_JOB": request.config.to_json(),
        ERROR_FILE: f"{WORK}/error.json",
        TERMINATION_LOG: "/dev/termination-log",
        "HOME": SCRATCH,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # torchrun sends all that its processes print to the pod's log, each line with the process' rank.
        "PET_TEE": "3",
        "PET_LOG_DIR": f"{WORK}/logs",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${rank}] ",
    }
    if request.compute.gpus:
        values["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
    else:
        cpus = int(request.compute.cpus.removesuffix("m")) // 1000
        values["OMP_NUM_THREADS"] = str(max(1, cpus // request.processes))
    values.update(request.tracking)
    if request.store.endpoint:
        values["AWS_ENDPOINT_URL"] = request.store.endpoint
    if request.store.region:
        values["AWS_DEFAULT_REGION"] = request.store.region
    variables: list[Manifest] = [{"name": name, "value": value} for name, value in values.items()]
    if request.store.secret:
        keys = {"AWS_ACCESS_KEY_ID": "accesskey", "AWS_SECRET_ACCESS_KEY": "secretkey"}
        variables += [
            {
                "name": name,
                "valueFrom": {"secretKeyRef": {"name": request.store.secret, "key": key, "optional": True}},
            }
            for name, key in keys.items()
        ]
    variables += [{"name": name, "valueFrom": {"secretKeyRef": key}} for name, key in request.login.items()]
    return variables
