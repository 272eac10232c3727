"""What a job is: the stage's command and the check of its output, and what one attempt asks of a cluster."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from draft_model.jobs.compute import Compute
from draft_model.parameters import Parameters

Manifest = dict[str, Any]
"""A Kubernetes object as JSON."""

LABEL = "draft-model"
RUN_ID = f"{LABEL}/run-id"
ATTEMPT = f"{LABEL}/attempt"
SPEC_HASH = f"{LABEL}/spec-sha256"
QUEUE = "kueue.x-k8s.io/queue-name"


@dataclass(frozen=True)
class Kind:
    """A kind of custom objects: API group, its version, plural (in paths) and kind (in objects)."""

    group: str
    version: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        """Group and version, as objects have them."""
        return f"{self.group}/{self.version}"


WORKFLOW = Kind("argoproj.io", "v1alpha1", "workflows", "Workflow")


@dataclass(frozen=True)
class JobSpec:
    """One of the pipeline's heavy stages as a job: its command, and the check of its output."""

    stage: Literal["training", "regenerate", "evaluate"]  # part of names, labels and the record's file name
    module: str  # each process runs `python -m` this
    config: str  # JSON that each process reads from the environment variable DRAFT_MODEL_JOB
    uris: Mapping[str, str]  # that the pods read and write, by parameter
    output: str  # URI that record and logs go beside
    parameters: Parameters  # limits, attempts, compute map, object store's Secret
    nodes: int  # pods of the job
    processes: int  # per pod
    check: Callable[[], list[str]]  # what the output lacks: exit code 0 alone is no success
    prepare: Callable[[], None] = lambda: None  # clears an earlier run's output before a run's first attempt
    image: str = ""  # of the pods; empty for the one that DRAFT_MODEL_IMAGE names


@dataclass(frozen=True)
class JobRequest:
    """One attempt of a run's job; holds no credential."""

    run_id: str
    attempt: int  # from 0
    spec: JobSpec
    compute: Compute
    image: str
    namespace: str = "default"
    owner: Manifest | None = None  # owner reference; the job is garbage-collected with that object
    variables: Mapping[str, str] = field(default_factory=dict)  # that lead to object store and experiment tracking
    login: Mapping[str, Manifest] = field(default_factory=dict)  # references to Secret keys, by environment variable

    @property
    def name(self) -> str:
        """The job's name: eight characters of the run's id, the stage (unless training) and the attempt."""
        short = re.sub("[^a-z0-9]", "", self.run_id.lower())[:8]
        if len(short) < 8:  # not the UUID that Kubeflow gives
            short = hashlib.sha256(self.run_id.encode()).hexdigest()[:8]
        stage = "" if self.spec.stage == "training" else f"-{self.spec.stage}"
        return f"draft-{short}{stage}-a{self.attempt}"

    @property
    def deadline(self) -> int:
        """Seconds after which Kubernetes itself ends the job."""
        return 60 * (self.spec.parameters.start_limit + self.spec.parameters.run_limit)

    def labels(self) -> dict[str, str]:
        """Labels of the job and of its pods."""
        return {
            "app.kubernetes.io/name": "draft-model",
            "app.kubernetes.io/component": self.spec.stage,
            RUN_ID: self.run_id,
            ATTEMPT: str(self.attempt),
        }


def digest(specs: Any) -> str:
    """SHA-256 of specifications: of what is asked for, not of the owner, which a retried step may not get to know."""
    return hashlib.sha256(json.dumps(specs, sort_keys=True).encode()).hexdigest()
