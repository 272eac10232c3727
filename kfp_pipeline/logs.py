"""Why a step failed: the pods of a run and their logs.

KFP's tasks name neither a pod nor an error (kubeflow/pipelines#14007). The run's Argo Workflow does, and KFP's v1beta1
API has it as text; its status is packed where it is longer than 1 MiB.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from draft_model.errors import DraftModelError
from kfp_pipeline.client import Server

_KLOG = re.compile(r"([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+\.go:\d+\] ?(.*)")
_ARGO = re.compile(r'time="?\d{4}-|\{"time":|Error: exit status |\[KFP Executor ')
_INPUT = re.compile(r"^\[KFP Executor [^\n]*executor_input:\n\{\n.*?^\}$", re.MULTILINE | re.DOTALL)  # indented JSON
_LOST = re.compile(r"pod deleted|OOMKilled|evict|preempt|low on resource|shut ?down|exit code 1(37|43)", re.IGNORECASE)
_TAIL = 20


@dataclass(frozen=True)
class Pod:
    """A pod of a run: phase and message are Argo's; a driver is KFP's own, before the step's."""

    step: str
    name: str
    phase: str
    message: str
    driver: bool
    namespace: str
    created: str  # the Workflow's date
    started: str = ""  # when Argo asked for the pod

    @property
    def failed(self) -> bool:
        """Whether it ended without success."""
        return self.phase in ("Failed", "Error")

    @property
    def lost(self) -> bool:
        """Whether it was ended from outside: out of memory, evicted, deleted."""
        return self.failed and bool(_LOST.search(self.message))


def workflow(server: Server, run_id: str) -> dict[str, Any]:
    """The run's Argo Workflow with its nodes; empty where the server does not give it."""
    try:
        answer = json.loads(server.get(f"/apis/v1beta1/runs/{run_id}"))
        found: dict[str, Any] = json.loads(answer["pipeline_runtime"]["workflow_manifest"])
        if packed := found["status"].get("compressedNodes"):
            found["status"]["nodes"] = json.loads(gzip.decompress(base64.b64decode(packed)))
        return found
    except (DraftModelError, ValueError, KeyError, TypeError, OSError):
        return {}


def pods(found: dict[str, Any]) -> dict[str, Pod]:
    """The last pod of each step of a Workflow, by the step's name, in the order in which they began."""
    last: dict[str, Pod] = {}
    workflow = found.get("metadata", {})
    nodes = found.get("status", {}).get("nodes") or {}
    for node in sorted(nodes.values(), key=lambda node: node.get("startedAt") or ""):
        if node["type"] != "Pod":
            continue
        # workflow.root.handler.STEP.executor or workflow.root.handler.STEP-driver, each with (attempt) where retried
        *_, parent, own = re.sub(r"\(\d+\)", "", node["name"]).split(".")
        driver = own.endswith("-driver")
        step = own.removesuffix("-driver") if driver else parent
        name = f"{workflow['name']}-{node['templateName']}-{node['id'].rpartition('-')[2]}"
        where = workflow.get("namespace", "kubeflow"), workflow.get("creationTimestamp", "")[:10]
        last.pop(step, None)  # the new one comes last
        phase, message, started = (node.get(key) or "" for key in ("phase", "message", "startedAt"))
        last[step] = Pod(step, name, phase, message, driver, *where, started)
    return last


def read(server: Server, run_id: str, pod: Pod) -> list[str]:
    """The lines of a pod's log, from the pod or KFP's archive.

    Raises:
        DraftModelError: where the server does not give it.
    """
    query = f"podname={pod.name}&podnamespace={pod.namespace}&runid={run_id}&createdat={pod.created}"
    for path in (f"/apis/v1alpha1/runs/{run_id}/nodes/{pod.name}/log", f"/k8s/pod/logs?{query}"):  # the API's, the UI's
        with suppress(DraftModelError):
            text = server.get(path)
            if not re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE):  # the UI's own page
                return text.splitlines()
    raise DraftModelError(f"{server.host} does not give the log of {pod.step}")


def own_lines(lines: list[str]) -> list[str]:
    """A log without the lines of KFP's launcher and executor and of Argo."""
    lines = _INPUT.sub("", "\n".join(lines)).splitlines()
    return [line for line in lines if line.strip() and not _KLOG.match(line) and not _ARGO.match(line)]


def reason(pod: Pod, lines: list[str]) -> list[str]:
    """The lines that say why a pod failed: its error message, else the last lines; the last one of a driver."""
    if pod.driver:
        fatal = [found[2] for line in lines if (found := _KLOG.match(line)) and found[1] in "EF"]
        return [f"KFP's driver failed before the step began: {(fatal or own_lines(lines) or ['no reason given'])[-1]}"]
    own = own_lines(lines)
    starts = [at for at, line in enumerate(own) if line.startswith("error: ")]
    return own[starts[-1] :] if starts else own[-_TAIL:]
