"""What a job is, and the objects that it is on a cluster: a PyTorchJob (training-operator 1.x) or a TrainJob (2.x).

Both have the same pods. A TrainJob's own field for overriding pods changed its name with every minor version, so each
job has a TrainingRuntime with the whole pod template, and its TrainJob only refers to it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from draft_model.jobs.compute import Compute
from draft_model.parameters import Parameters, Stage

Manifest = dict[str, Any]
"""A Kubernetes object as JSON."""
RUN_ID, ATTEMPT, SPEC_HASH = "draft-model/run-id", "draft-model/attempt", "draft-model/spec-sha256"
QUEUE = "kueue.x-k8s.io/queue-name"
WORK = "/tmp/draft-model"  # noqa: S108  in the only folder that the pods may write to
GRACE_SECONDS = 300  # see pod.yaml
_KEPT_SECONDS = 86_400
_TRAINER = "trainer.kubeflow.org"


class Kind(NamedTuple):
    """A kind of custom objects."""

    group: str
    version: str
    plural: str  # in paths
    kind: str  # in objects


PYTORCHJOB = Kind("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob")
TRAINJOB = Kind(_TRAINER, "v1alpha1", "trainjobs", "TrainJob")
RUNTIME = Kind(_TRAINER, "v1alpha1", "trainingruntimes", "TrainingRuntime")
WORKFLOW = Kind("argoproj.io", "v1alpha1", "workflows", "Workflow")


@dataclass(frozen=True)
class Job:
    """One of the pipeline's stages as a job of a run, in one attempt; holds no credential."""

    stage: Stage
    config: str  # JSON that each process reads from the environment variable DRAFT_MODEL_JOB
    uris: Mapping[str, str]  # that the pods read and write, by parameter
    output: str  # URI that record and logs go beside
    parameters: Parameters  # limits, attempts, compute map, object store's Secret
    check: Callable[[], list[str]]  # what the output lacks: exit code 0 alone is no success
    prepare: Callable[..., None] = lambda *, again: None  # before a run's first attempt, and `again` after it failed
    nodes: int = 1  # pods of the job
    processes: int = 1  # per pod
    run_id: str = ""
    attempt: int = 0

    # On a cluster: see context.complete.
    compute: Compute = Compute("", "")  # noqa: RUF009  (frozen)
    image: str = ""
    namespace: str = "default"
    owner: Manifest | None = None  # owner reference; the job is garbage-collected with that object
    variables: Mapping[str, str] = field(default_factory=dict)  # that lead to object store, Hub and tracking
    login: Mapping[str, Manifest] = field(default_factory=dict)  # references to Secret keys, by environment variable

    # Once it is there: see Backend.create_or_adopt. One of the same name with another uid is another job.
    uid: str = ""
    adopted: bool = False

    @property
    def command(self) -> list[str]:
        """Of the pods: torchrun reads nodes, ranks and the rendezvous from the variables that the operator sets."""
        if self.stage == "train":
            return ["python", "-m", "draft_model.jobs.torchrun", "-m", "draft_model.training"]
        return ["python", "-m", "draft_model.steps"]

    @property
    def name(self) -> str:
        """Eight characters of the run's id, the stage (unless it is the training) and the attempt."""
        short = re.sub("[^a-z0-9]", "", self.run_id.lower())[:8]
        if len(short) < 8:  # not the UUID that Kubeflow gives
            short = hashlib.sha256(self.run_id.encode()).hexdigest()[:8]
        stage = "" if self.stage == "train" else f"-{self.stage}"
        return f"draft-{short}{stage}-a{self.attempt}"

    @property
    def deadline(self) -> int:
        """Seconds after which Kubernetes itself ends the job."""
        return 60 * (self.parameters.start_limit + self.parameters.run_limit)

    @property
    def replicas(self) -> dict[str, int]:
        """Pods of a PyTorchJob by replica type: one Master and N-1 Workers, or Workers only where it is elastic."""
        nodes = self.nodes
        if self.compute.restarts:
            return {"Worker": nodes}
        return {"Master": 1, **({"Worker": nodes - 1} if nodes > 1 else {})}

    def labels(self) -> dict[str, str]:
        """Labels of the job and of its pods."""
        return {
            "app.kubernetes.io/name": "draft-model",
            "app.kubernetes.io/component": self.stage,
            RUN_ID: self.run_id,
            ATTEMPT: str(self.attempt),
        }


def pytorchjob(job: Job) -> list[Manifest]:
    """The PyTorchJob."""
    template = pod_template(job, "pytorch")
    spec: Manifest = {
        "nprocPerNode": str(job.processes),
        "runPolicy": {
            "cleanPodPolicy": "None",  # logs and exit codes of the pods are read after the end
            "ttlSecondsAfterFinished": _KEPT_SECONDS,
            "activeDeadlineSeconds": job.deadline,
            "backoffLimit": 0,
            # Kueue resumes the job; a queue that nothing manages must not start it.
            "suspend": bool(job.compute.queue),
        },
        "pytorchReplicaSpecs": {
            name: {"replicas": replicas, "restartPolicy": "Never", "template": template}
            for name, replicas in job.replicas.items()
        },
    }
    if job.compute.restarts:
        nodes = {"minReplicas": job.nodes, "maxReplicas": job.nodes}
        spec["elasticPolicy"] = {**nodes, "rdzvBackend": "c10d", "maxRestarts": job.compute.restarts}
    return _objects(job, {PYTORCHJOB: spec})


def trainjob(job: Job) -> list[Manifest]:
    """The TrainingRuntime and the TrainJob, in the order in which they are created."""
    replicated: Manifest = {
        "name": "node",
        "template": {
            # The trainer applies the nodes' command, size and ranks to this replicated job.
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {"backoffLimit": 0, "template": pod_template(job, "node")},
        },
    }
    jobset = {"failurePolicy": {"maxRestarts": job.compute.restarts}, "replicatedJobs": [replicated]}
    runtime = {"mlPolicy": {"numNodes": job.nodes, "torch": {}}, "template": {"spec": jobset}}
    made: Manifest = {
        "runtimeRef": {"apiGroup": _TRAINER, "kind": RUNTIME.kind, "name": job.name},
        "trainer": {"numNodes": job.nodes, "numProcPerNode": job.processes},
        "activeDeadlineSeconds": job.deadline,
        "suspend": bool(job.compute.queue),
    }
    return _objects(job, {RUNTIME: runtime, TRAINJOB: made})


def _objects(job: Job, specs: Mapping[Kind, Manifest]) -> list[Manifest]:
    """The objects; their hash is of what is asked for, not of the owner, which a retried step may not get to know."""
    digest = hashlib.sha256(json.dumps(list(specs.values()), sort_keys=True).encode()).hexdigest()
    made = []
    for kind, spec in specs.items():
        queue = {QUEUE: job.compute.queue} if job.compute.queue and kind != RUNTIME else {}
        metadata: Manifest = {
            "name": job.name,
            "namespace": job.namespace,
            "labels": {**job.labels(), **queue},
            "annotations": {SPEC_HASH: digest},
        }
        if job.owner:
            metadata["ownerReferences"] = [job.owner]
        api_version = f"{kind.group}/{kind.version}"
        made.append({"apiVersion": api_version, "kind": kind.kind, "metadata": metadata, "spec": spec})
    return made


def pod_template(job: Job, container: str) -> Manifest:
    """The template of the job's pods: pod.yaml, and what differs between jobs; credentials by reference only."""
    compute = job.compute
    template: Manifest = yaml.safe_load(files(__package__).joinpath("pod.yaml").read_text(encoding="utf-8"))
    template["metadata"]["labels"] |= job.labels()
    nodes = {"nodeSelector": compute.node_selector, "tolerations": compute.tolerations,
             "priorityClassName": compute.priority_class}  # fmt: skip
    template["spec"] |= {name: value for name, value in nodes.items() if value}
    (main,) = template["spec"]["containers"]
    main |= {"name": container, "image": job.image, "command": job.command}
    # Memory and GPUs are the pod's own, idle CPUs anybody's.
    gpus = {compute.gpu_resource: str(compute.gpus)} if compute.gpus else {}
    own = {"memory": compute.memory, **gpus}
    main["resources"] = {"requests": {"cpu": compute.cpus, **own}, "limits": own if compute.limited else gpus}
    values = {"DRAFT_MODEL_JOB": job.config, **job.variables}
    if compute.gpus:
        values["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
    elif compute.limited:
        cpus = int(compute.cpus.removesuffix("m")) // 1000
        values["OMP_NUM_THREADS"] = str(max(1, cpus // job.processes))
    main["env"] += [{"name": name, "value": value} for name, value in values.items()]
    main["env"] += [{"name": name, "valueFrom": {"secretKeyRef": key}} for name, key in job.login.items()]
    return template
