"""A cluster in memory with the methods of `jobs.cluster.Cluster`, for what needs no API server to be shown."""

from __future__ import annotations

import copy
import itertools

from draft_model.jobs.spec import PYTORCHJOB, WORKFLOW
from jobs.requests import RUN


class FakeCluster:
    """Objects by kind and name; a script says what the job's status is at each look.

    The script has for each look at the job its status and pods, or an exception; the last one stays. A look takes a
    minute of the clock.
    """

    namespace = "team"

    def __init__(self, script=(), clock=None, kinds=(PYTORCHJOB,)) -> None:
        self.there, self._uids = {}, itertools.count(1)
        self.script, self.clock, self.kinds = list(script), clock, kinds
        self.now, self.events, self.kueue, self.workflow = {}, [], None, None

    def has(self, kind):
        return kind in self.kinds

    def groups(self):
        return {"kubeflow.org": "v1"} | ({} if self.kueue is None else {"kueue.x-k8s.io": "v1beta2"})

    def create(self, kind, manifest):
        key = (kind, manifest["metadata"]["name"])
        if key in self.there:
            return None
        made = copy.deepcopy(manifest)
        made["metadata"]["uid"] = f"uid-{next(self._uids)}"
        self.there[key] = made
        return made

    def get(self, kind, name):
        if kind == WORKFLOW:
            return self.workflow
        if self.clock:
            self.clock.minutes += 1
        if self.script:
            self.now = self.script.pop(0)
        if isinstance(self.now, SystemExit):  # a signal comes once
            error, self.now = self.now, {}
            raise error
        if isinstance(self.now, Exception):
            raise self.now
        found = self.there.get((kind, name))
        if found is None or self.now is None:
            return None
        job = copy.deepcopy(found)
        if "status" in self.now:
            job["status"] = self.now["status"]
        if "suspend" in self.now:
            job["spec"]["runPolicy"]["suspend"] = self.now["suspend"]
        return job

    def objects(self, kind, selector=""):
        if kind.group == "kueue.x-k8s.io":
            return self.kueue
        return [found for (of, _), found in self.there.items() if of == kind]

    def pod(self, name):
        return None

    def pods(self, selector):
        return self.now.get("pods", []) if isinstance(self.now, dict) and self.there else []

    def warnings(self):
        return self.events

    def config_map(self, name):
        return None

    def delete(self, kind, name):
        self.there.pop((kind, name), None)

    def wait(self, kind, name, version, seconds):
        pass

    def log(self, pod, container, since):
        return iter(())


class Clock:
    """Minutes that pass when somebody looks."""

    minutes = 0

    def __call__(self) -> float:
        return 60.0 * self.minutes


def pod(name="draft-3f2c9a10-a0-master-0", waiting=None, reason="", job="draft-3f2c9a10-a0", **terminated):
    """A pod that waits, or whose container has ended."""
    state = {"waiting": waiting} if waiting else {"terminated": terminated} if terminated else {"running": {}}
    found = {"containerStatuses": [{"name": "pytorch", "state": state}], "phase": "Running"}
    if reason:
        found |= {"reason": reason, "phase": "Failed", "containerStatuses": []}
    prefix = "training.kubeflow.org/"
    labels = {f"{prefix}job-name": job, f"{prefix}replica-type": "master", f"{prefix}replica-index": "0"}
    metadata = {"name": name, "uid": name, "labels": {**labels, "draft-model/run-id": RUN}}
    return {"metadata": metadata, "spec": {"containers": [{}]}, "status": found}


def status(kind="Created", message="", pods=None, **more):
    """The job's status with one condition that holds."""
    running = [pod()] if kind in ("Running", "Restarting") and pods is None else pods or []
    conditions = [{"type": kind, "status": "True", "message": message}]
    return {"status": {"conditions": conditions}, "pods": running, **more}
