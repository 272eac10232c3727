"""A cluster in memory with the methods of `jobs.cluster.Cluster`, for what needs no API server to be shown."""

from __future__ import annotations

import copy
import itertools

from draft_model.jobs.kubernetes import KubernetesBackend
from draft_model.jobs.pytorchjob import PYTORCHJOB
from draft_model.jobs.states import State


class FakeCluster:
    """Objects by kind and name; a script says what the job's status is at each look.

    Args:
        script: for each look at the job its conditions and pods, or an exception; the last one stays.
        clock: is moved on by a minute with each look.
    """

    namespace = "team"

    def __init__(self, script=(), clock=None) -> None:
        self.objects_there, self._uids = {}, itertools.count(1)
        self.script, self.clock = list(script), clock
        self.now, self.events, self.kueue = None, [], None

    def has(self, kind):
        return kind == PYTORCHJOB

    def groups(self):
        return {"kubeflow.org": "v1"} | ({} if self.kueue is None else {"kueue.x-k8s.io": "v1beta2"})

    def create(self, kind, manifest):
        key = (kind, manifest["metadata"]["name"])
        if key in self.objects_there:
            return None
        made = copy.deepcopy(manifest)
        made["metadata"]["uid"] = f"uid-{next(self._uids)}"
        self.objects_there[key] = made
        return made

    def get(self, kind, name):
        if self.clock:
            self.clock.minutes += 1
        if self.script:
            self.now = self.script.pop(0)
        if isinstance(self.now, Exception):
            raise self.now
        found = self.objects_there.get((kind, name))
        if found is None or self.now is None:
            return None
        job = {**found, "status": {**found.get("status", {}), **self.now.get("status", {})}}
        if "suspend" in self.now:
            job = copy.deepcopy(job)
            job["spec"]["runPolicy"]["suspend"] = self.now["suspend"]
        return job

    def objects(self, kind, selector=""):
        if kind.group == "kueue.x-k8s.io":
            return self.kueue
        return [found for (there, _), found in self.objects_there.items() if there == kind]

    def pods(self, selector):
        return self.now.get("pods", []) if isinstance(self.now, dict) and self.objects_there else []

    def warnings(self):
        return self.events

    def config_map(self, name):
        return None

    def delete(self, kind, name):
        self.objects_there.pop((kind, name), None)

    def watch(self, kind, name, version):
        return iter(())

    def log(self, pod, container, since):
        return iter(())


class Clock:
    """Minutes that pass when somebody looks."""

    minutes = 0

    def __call__(self) -> float:
        return 60.0 * self.minutes


def status(kind="", message="", active=0, **more):
    """The job's status with one condition that holds."""
    conditions = [{"type": kind, "status": "True", "message": message}] if kind else []
    return {"status": {"conditions": conditions, "replicaStatuses": {"Master": {"active": active}}}, **more}


def pod(name="draft-3f2c9a10-a0-master-0", waiting=None, reason="", **terminated):
    """A pod that waits, or whose container has ended."""
    state = {"waiting": waiting} if waiting else {"terminated": terminated} if terminated else {"running": {}}
    found = {"containerStatuses": [{"name": "pytorch", "state": state}], "phase": "Running"}
    if reason:
        found |= {"reason": reason, "phase": "Failed", "containerStatuses": []}
    labels = {"training.kubeflow.org/replica-type": "master", "training.kubeflow.org/replica-index": "0"}
    return {"metadata": {"name": name, "uid": name, "labels": labels}, "spec": {"containers": [{}]}, "status": found}


__all__ = ["Clock", "FakeCluster", "KubernetesBackend", "State", "pod", "status"]
