"""The TrainJob back end: Kubeflow Trainer 2.x (`trainer.kubeflow.org/v1alpha1`).

Where a TrainJob may override its pods changed its name with every minor version. So each run has a TrainingRuntime of
its own that holds the whole pod template, and the TrainJob only refers to it.
"""

from __future__ import annotations

from draft_model.jobs.kubernetes import KubernetesBackend
from draft_model.jobs.pods import pod_template
from draft_model.jobs.request import JobRequest, Kind, Manifest, with_hash
from draft_model.jobs.states import State, Status

_GROUP = "trainer.kubeflow.org"
TRAINJOB = Kind(_GROUP, "v1alpha1", "trainjobs", "TrainJob")
RUNTIME = Kind(_GROUP, "v1alpha1", "trainingruntimes", "TrainingRuntime")
CONTAINER = "node"
_INDEX = "batch.kubernetes.io/job-completion-index"


class TrainJobs(KubernetesBackend):
    """Training jobs as TrainJobs, each with a runtime of its own."""

    name = "trainjob"
    kind = TRAINJOB
    kinds = (RUNTIME, TRAINJOB)
    container = CONTAINER

    @staticmethod
    def render(request: JobRequest) -> list[Manifest]:
        """The TrainingRuntime and the TrainJob.

        Args:
            request: what is asked for.
        """
        metadata = request.metadata()
        replicated: Manifest = {
            "name": "node",
            "template": {
                # The trainer takes the nodes' command, size and ranks to this replicated job.
                "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                "spec": {"backoffLimit": 0, "template": pod_template(request, CONTAINER)},
            },
        }
        runtime: Manifest = {
            "apiVersion": RUNTIME.api_version,
            "kind": RUNTIME.kind,
            "metadata": {**metadata, "labels": request.labels()},
            "spec": {
                "mlPolicy": {"numNodes": request.nodes, "torch": {}},
                "template": {
                    "spec": {"failurePolicy": {"maxRestarts": request.compute.restarts}, "replicatedJobs": [replicated]}
                },
            },
        }
        job: Manifest = {
            "apiVersion": TRAINJOB.api_version,
            "kind": TRAINJOB.kind,
            "metadata": metadata,
            "spec": {
                "runtimeRef": {"apiGroup": _GROUP, "kind": RUNTIME.kind, "name": request.name},
                "trainer": {"numNodes": request.nodes, "numProcPerNode": request.processes},
                "activeDeadlineSeconds": request.deadline,
                "suspend": bool(request.compute.queue),
            },
        }
        return with_hash([runtime, job])

    @staticmethod
    def status_of(job: Manifest, pods: list[Manifest]) -> Status:
        """The state that a TrainJob's conditions mean; whether all of it runs, its pods tell."""
        conditions = {c["type"]: c for c in job.get("status", {}).get("conditions") or () if c["status"] == "True"}
        if failed := conditions.get("Failed"):
            return Status(State.FAILED, failed.get("message", ""))
        if "Complete" in conditions:
            return Status(State.SUCCEEDED)
        if job["spec"].get("suspend"):
            return Status(State.QUEUED, conditions.get("Suspended", {}).get("message", "suspended"))
        wanted = job["spec"]["trainer"]["numNodes"]
        active = sum(pod.get("status", {}).get("phase") in ("Running", "Succeeded") for pod in pods)
        state = State.RUNNING if active >= wanted else State.STARTING
        return Status(state, f"{active} of {wanted} pods run")

    @staticmethod
    def selector(name: str) -> str:
        """Label selector of a job's pods: the JobSet has the TrainJob's name."""
        return f"jobset.sigs.k8s.io/jobset-name={name}"

    @staticmethod
    def node_rank(pod: Manifest, request: JobRequest) -> int:
        """Which node of the job a pod is."""
        metadata = pod["metadata"]
        return int({**metadata.get("annotations", {}), **metadata["labels"]}.get(_INDEX, "0"))
