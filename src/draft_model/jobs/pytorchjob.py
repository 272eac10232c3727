"""The PyTorchJob back end: training-operator 1.x (`kubeflow.org/v1`)."""

from __future__ import annotations

from draft_model.jobs.kubernetes import KubernetesBackend
from draft_model.jobs.pods import pod_template
from draft_model.jobs.request import JobRequest, Kind, Manifest, with_hash
from draft_model.jobs.states import State, Status

PYTORCHJOB = Kind("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob")
CONTAINER = "pytorch"
_KEPT_SECONDS = 86_400


class PyTorchJobs(KubernetesBackend):
    """Training jobs as PyTorchJobs: one Master and N-1 Workers, or Workers only where the job is elastic."""

    name = "pytorchjob"
    kind = PYTORCHJOB
    kinds = (PYTORCHJOB,)
    container = CONTAINER

    @staticmethod
    def render(request: JobRequest) -> list[Manifest]:
        """The PyTorchJob.

        Args:
            request: what is asked for.
        """
        template = pod_template(request, CONTAINER)
        spec: Manifest = {
            "nprocPerNode": str(request.processes),
            "runPolicy": {
                "cleanPodPolicy": "None",  # the pods' logs and exit codes are read after the end
                "ttlSecondsAfterFinished": _KEPT_SECONDS,
                "activeDeadlineSeconds": request.deadline,
                "backoffLimit": 0,
                # Kueue lets the job go; a queue that nobody manages must not start it.
                "suspend": bool(request.compute.queue),
            },
            "pytorchReplicaSpecs": {
                name: {"replicas": replicas, "restartPolicy": "Never", "template": template}
                for name, replicas in _replicas(request).items()
            },
        }
        if request.compute.restarts:
            spec["elasticPolicy"] = {
                "minReplicas": request.nodes,
                "maxReplicas": request.nodes,
                "rdzvBackend": "c10d",
                "maxRestarts": request.compute.restarts,
            }
        job = {
            "apiVersion": PYTORCHJOB.api_version,
            "kind": PYTORCHJOB.kind,
            "metadata": request.metadata(),
            "spec": spec,
        }
        return with_hash([job])

    @staticmethod
    def status_of(job: Manifest, pods: list[Manifest]) -> Status:
        """The state that a PyTorchJob's conditions mean."""
        conditions = {c["type"]: c for c in job.get("status", {}).get("conditions") or () if c["status"] == "True"}
        if failed := conditions.get("Failed"):
            return Status(State.FAILED, failed.get("message", ""))
        if "Succeeded" in conditions:
            return Status(State.SUCCEEDED)
        if job["spec"].get("runPolicy", {}).get("suspend") or "Suspended" in conditions:
            return Status(State.QUEUED, conditions.get("Suspended", {}).get("message", "suspended"))
        if restarting := conditions.get("Restarting"):
            return Status(State.RESTARTING, restarting.get("message", ""))
        wanted = sum(replica.get("replicas", 1) for replica in job["spec"]["pytorchReplicaSpecs"].values())
        found = job.get("status", {}).get("replicaStatuses") or {}
        active = sum(replica.get("active", 0) + replica.get("succeeded", 0) for replica in found.values())
        running = "Running" in conditions and active == wanted
        return Status(State.RUNNING if running else State.STARTING, f"{active} of {wanted} pods run")

    @staticmethod
    def selector(name: str) -> str:
        """Label selector of a job's pods."""
        return f"training.kubeflow.org/job-name={name}"

    @staticmethod
    def node_rank(pod: Manifest, request: JobRequest) -> int:
        """Which node of the job a pod is: the Master is node 0 and the Workers come after it."""
        labels = pod["metadata"]["labels"]
        index = int(labels.get("training.kubeflow.org/replica-index", "0"))
        after_master = labels.get("training.kubeflow.org/replica-type") == "worker" and "Master" in _replicas(request)
        return index + int(after_master)


def _replicas(request: JobRequest) -> dict[str, int]:
    if request.compute.restarts:
        return {"Worker": request.nodes}
    return {"Master": 1, **({"Worker": request.nodes - 1} if request.nodes > 1 else {})}
