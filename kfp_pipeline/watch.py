"""Follows a run: a line for each task whose state changes, until the run has ended, and then why it did.

KFP's tasks name neither a pod nor an error (kubeflow/pipelines#14007). The run's Argo Workflow does, and KFP's v1beta1
API has it as text; its status is packed where it is longer than 1 MiB.
"""

from __future__ import annotations

import base64
import gzip
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters
from kfp_pipeline.client import NotLetIn, Server, ServerAway

logger = logging.getLogger(__name__)

STEPS = ("preflight", "import-model", "build-dataset", "train-draft-model", "evaluate-draft-model", "clean-up")
SUCCEEDED = "SUCCEEDED"
ENDS = (SUCCEEDED, "FAILED", "CANCELED", "SKIPPED")
PAUSES = (0.5, 10.0)  # seconds between two polls: at first, when states change often, and later
PATIENCE = timedelta(minutes=30)  # how long a server may be unreachable
STALL = 120.0
"""Seconds without a change after which the run's Workflow is asked for what it waits for; doubled up to ten minutes."""
_CHECKPOINT = re.compile(r"checkpoint .*\w+://\S+")
_KLOG = re.compile(r"([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+\.go:\d+\] ?(.*)")
_ARGO = re.compile(r'time="?\d{4}-|\{"time":|Error: exit status |\[KFP Executor ')
_INPUT = re.compile(r"^\[KFP Executor [^\n]*executor_input:\n\{\n.*?^\}$", re.MULTILINE | re.DOTALL)  # indented JSON
_LOST = re.compile(r"pod deleted|OOMKilled|evict|preempt|low on resource|shut ?down|exit code 1(37|43)", re.IGNORECASE)
_TAIL = 20


class Stuck(DraftModelError):
    """A run of which a step's pod has been pending for longer than start_limit; KFP itself has no limit."""


@dataclass(frozen=True)
class Pod:
    """A pod of a run: phase and message are Argo's; a driver is KFP's own, before the step's."""

    step: str
    phase: str
    message: str
    started: str  # when Argo asked for the pod
    driver: bool
    query: dict[str, str]  # for its log: name, namespace, the Workflow's date

    @property
    def failed(self) -> bool:
        """Whether it ended without success."""
        return self.phase in ("Failed", "Error")


@dataclass
class Ended:
    """How a run ended."""

    state: str  # of the run, as KFP names it
    outcome: str  # succeeded, failed, terminated (by a person) or lost (a step's pod was killed from outside)
    failures: dict[str, list[str]] = field(default_factory=dict)  # why each failed step did, several lines each
    notes: list[str] = field(default_factory=list)  # what the exit task says, the newest checkpoint, how to go on
    explained: bool = True  # whether the server gave the logs


def watch(server: Server, run_id: str) -> Ended:
    """Logs the states of a run's steps until the run has ended.

    Raises:
        DraftModelError: where there is no such run, or the server is unreachable for longer than PATIENCE.
        Stuck: where a step's pod is pending for longer than the run's start_limit.
    """
    seen: dict[str, str] = {}
    stall, changed, told = STALL, time.monotonic(), ""
    for run in _polls(server, run_id):
        for name, state, took in states(run):
            if seen.get(name) != state:
                seen[name], changed, stall = state, time.monotonic(), STALL
                logger.info("%s: %s%s", name, state, f" after {took}" if took else "")
        if run.state not in ENDS and time.monotonic() - changed > stall:
            stall += min(stall, 600.0)
            if (waits := _what_it_waits_for(server, run)) not in ("", told):
                logger.info("%s", waits)
                told = waits
    return explain(server, run)


def _polls(server: Server, run_id: str) -> Iterator[Any]:
    """The run as the server shows it, again and again, the ended one last."""
    pause, longest = PAUSES
    away: float | None = None
    while True:
        try:
            run = server.client.get_run(run_id)
            if not run.run_id:
                raise ServerAway(f"{server.host} answers without the run")
        except (ServerAway, NotLetIn) as error:
            if away is None:
                away = time.monotonic()
                logger.info("%s\nThe run goes on; asking again for %.0f minutes.", error, PATIENCE.total_seconds() / 60)
            elif time.monotonic() - away > PATIENCE.total_seconds():
                raise
        else:
            if away is not None:
                logger.info("The server answers again.")
                away = None
            yield run
            if run.state in ENDS:
                return
        time.sleep(pause)
        pause = min(pause * 1.5, longest)


def states(run: Any) -> list[tuple[str, str, str]]:
    """Name, state and duration of each step that has begun, in that order; KFP's own nodes are left out."""
    details = [d for d in (run.run_details and run.run_details.task_details) or [] if d.display_name in STEPS]
    chosen = {d.display_name: d for d in sorted(details, key=lambda d: d.state not in ENDS)}  # what goes on wins
    found = []
    for detail in sorted(chosen.values(), key=lambda d: str(d.start_time)):
        took = ""
        if detail.state in ENDS and detail.start_time and detail.end_time:
            took = str(timedelta(seconds=max(0, round((detail.end_time - detail.start_time).total_seconds()))))
        found.append((detail.display_name, detail.state, took))
    return found


def _what_it_waits_for(server: Server, run: Any) -> str:
    argos = workflow(server, run.run_id)
    if argos.get("status", {}).get("compressedNodes"):
        return (
            "KFP's server shows no further progress: the run's Workflow is longer than 1 MiB, and the server does not "
            "read its packed status. The run itself goes on; its end is seen here, its steps in the UI's graph"
        )
    waiting = [pod for pod in pods(argos).values() if pod.phase == "Pending" and pod.message]
    given = (run.runtime_config and run.runtime_config.parameters) or {}
    limit = timedelta(minutes=int(given.get("start_limit", Parameters().start_limit)))
    for pod in waiting:
        if pod.started and datetime.now(UTC) - datetime.fromisoformat(pod.started) > limit:
            raise Stuck(
                f"{pod.step}: its pod cannot start, and has waited for longer than start_limit ({limit}): "
                f"{pod.message}; KFP waits for ever: put right what is said, or terminate the run"
            )
    return "; ".join(f"{pod.step} waits: {pod.message}" for pod in waiting)


def explain(server: Server, run: Any) -> Ended:
    """Says how an ended run ended, from the logs of its steps."""
    if run.state == SUCCEEDED:
        return Ended(run.state, "succeeded")
    found = pods(workflow(server, run.run_id))
    ended = Ended(run.state, "failed", {name: [] for name, state, _ in states(run) if state == "FAILED"})
    ended.explained, checkpoints = bool(found), []
    for pod in found.values():
        if not pod.failed and pod.step != STEPS[-1]:
            continue
        try:
            lines = read_log(server, run.run_id, pod)
        except DraftModelError:
            lines, ended.explained = [], False
        checkpoints += [match[0] for line in lines if (match := _CHECKPOINT.search(line))]
        if pod.failed:
            ended.failures[pod.step] = [*filter(None, [pod.message]), *reason(pod, lines)]
        else:
            ended.notes += own_lines(lines)[-6:]
    if checkpoints and not any("checkpoint" in line for line in ended.notes):
        ended.notes.append(f"newest {checkpoints[-1]}")
    if not any("Retry" in line for line in ended.notes):
        ended.notes.append(
            "Retry in KFP's UI runs what did not succeed; a training goes on from its newest checkpoint."
        )
    history = [status.state for status in run.state_history or ()]
    while "RUNNING" in history:  # of Retry's last attempt alone
        history = history[history.index("RUNNING") + 1 :]
    if run.state == "CANCELED" or "CANCELING" in history:
        ended.outcome = "terminated"
    elif any(pod.failed and _LOST.search(pod.message) for pod in found.values()):  # out of memory, evicted, deleted
        ended.outcome = "lost"
    return ended


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


def pods(workflow: dict[str, Any]) -> dict[str, Pod]:
    """The last pod of each step of a Workflow, by the step's name, in the order in which they began."""
    last: dict[str, Pod] = {}
    metadata, nodes = workflow.get("metadata", {}), workflow.get("status", {}).get("nodes") or {}
    for node in sorted(nodes.values(), key=lambda node: node.get("startedAt") or ""):
        if node["type"] != "Pod":
            continue
        # workflow.root.handler.STEP.executor or workflow.root.handler.STEP-driver, each with (attempt) where retried
        *_, parent, own = re.sub(r"\(\d+\)", "", node["name"]).split(".")
        driver = own.endswith("-driver")
        step = own.removesuffix("-driver") if driver else parent
        query = {
            "podname": f"{metadata['name']}-{node['templateName']}-{node['id'].rpartition('-')[2]}",
            "podnamespace": metadata.get("namespace", "kubeflow"),
            "createdat": metadata.get("creationTimestamp", "")[:10],
        }
        last.pop(step, None)  # the new one comes last
        phase, message, started = (node.get(key) or "" for key in ("phase", "message", "startedAt"))
        last[step] = Pod(step, phase, message, started, driver, query)
    return last


def read_log(server: Server, run_id: str, pod: Pod) -> list[str]:
    """The lines of a pod's log, from the pod or KFP's archive.

    Raises:
        DraftModelError: where the server does not give it.
    """
    query = "&".join(f"{name}={value}" for name, value in {**pod.query, "runid": run_id}.items())
    of_api = f"/apis/v1alpha1/runs/{run_id}/nodes/{pod.query['podname']}/log"
    for path in (of_api, f"/k8s/pod/logs?{query}"):  # the UI's
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
    own = own_lines(lines)
    if pod.driver:
        fatal = [found[2] for line in lines if (found := _KLOG.match(line)) and found[1] in "EF"]
        return [f"KFP's driver failed before the step began: {(fatal or own or ['no reason given'])[-1]}"]
    starts = [at for at, line in enumerate(own) if line.startswith("error: ")]
    return own[starts[-1] :] if starts else own[-_TAIL:]
