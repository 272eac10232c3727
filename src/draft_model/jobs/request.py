"""What is asked of a back end: one attempt of one run's training job."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from draft_model.jobs.compute import Compute
from draft_model.training.config import TrainConfig

Manifest = dict[str, Any]
"""A Kubernetes object as JSON has it."""

LABEL = "draft-model"
RUN_ID = f"{LABEL}/run-id"
ATTEMPT = f"{LABEL}/attempt"
SPEC_HASH = f"{LABEL}/spec-sha256"
QUEUE = "kueue.x-k8s.io/queue-name"


@dataclass(frozen=True)
class Kind:
    """A kind of custom objects.

    Attributes:
        group: API group.
        version: of the group.
        plural: the kind's name in paths.
        kind: the kind's name in objects.
    """

    group: str
    version: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        """Group and version, as objects have them."""
        return f"{self.group}/{self.version}"


@dataclass(frozen=True)
class ObjectStore:
    """How the job's pods reach the object store; never a credential itself.

    Attributes:
        endpoint: URL; empty for AWS' own.
        region: empty for the default.
        secret: Secret with the keys `accesskey` and `secretkey`; it need not exist.
    """

    endpoint: str = ""
    region: str = ""
    secret: str = ""


@dataclass(frozen=True)
class JobRequest:
    """One attempt of a run's training job.

    Attributes:
        run_id: of the pipeline run.
        attempt: from 0.
        config: what the processes are told; its work folder is one inside the pods.
        compute: what each pod asks for.
        image: of the pods.
        store: how they reach the object store.
        namespace: where the job is made.
        owner: object whose end ends the job, as an owner reference.
        tracking: environment variables that lead to the experiment tracking.
        login: references to the Secrets' keys that log in there, by environment variable.
    """

    run_id: str
    attempt: int
    config: TrainConfig
    compute: Compute = field(default_factory=lambda: Compute("", ""))
    image: str = ""
    store: ObjectStore = ObjectStore()
    namespace: str = "default"
    owner: Manifest | None = None
    tracking: Mapping[str, str] = field(default_factory=dict)
    login: Mapping[str, Manifest] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The job's name, the same whoever asks: eight characters of the run's id, and the attempt."""
        return f"{name_of_run(self.run_id)}-a{self.attempt}"

    @property
    def nodes(self) -> int:
        """Pods of the job."""
        return self.config.parameters.num_nodes_draft_model_training

    @property
    def processes(self) -> int:
        """Processes per pod."""
        return self.config.parameters.number_of_gpu_to_use_draft_model_training

    @property
    def deadline(self) -> int:
        """Seconds after which Kubernetes itself ends the job, whoever still watches it."""
        return 60 * (self.config.parameters.start_limit + self.config.parameters.run_limit)

    def labels(self) -> dict[str, str]:
        """Labels of the job and of its pods."""
        return {
            "app.kubernetes.io/name": "draft-model",
            "app.kubernetes.io/component": "training",
            RUN_ID: self.run_id,
            ATTEMPT: str(self.attempt),
        }

    def metadata(self) -> Manifest:
        """Metadata of the job, without the hash of its specification."""
        metadata: Manifest = {"name": self.name, "namespace": self.namespace, "labels": self.labels()}
        if self.compute.queue:
            metadata["labels"][QUEUE] = self.compute.queue
        if self.owner:
            metadata["ownerReferences"] = [self.owner]
        return metadata


def name_of_run(run_id: str) -> str:
    """What the names of a run's jobs begin with."""
    short = re.sub("[^a-z0-9]", "", run_id.lower())[:8]
    if len(short) < 8:  # not the UUID that Kubeflow gives
        short = hashlib.sha256(run_id.encode()).hexdigest()[:8]
    return f"draft-{short}"


def with_hash(manifests: list[Manifest]) -> list[Manifest]:
    """Adds the hash that says whether a job that is there already is the one that was asked for.

    It covers the specifications: not the owner, which a coordinator that was started again may not get to know.
    """
    digest = hashlib.sha256(
        json.dumps([manifest["spec"] for manifest in manifests], sort_keys=True).encode()
    ).hexdigest()
    for manifest in manifests:
        manifest["metadata"].setdefault("annotations", {})[SPEC_HASH] = digest
    return manifests
