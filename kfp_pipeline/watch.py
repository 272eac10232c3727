"""Follows a run: a line for each task whose state changes, until the run has ended, and then why it did."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters
from kfp_pipeline import logs
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


class Stuck(DraftModelError):
    """A run of which a step's pod has been pending for longer than start_limit; KFP itself has no limit."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    state: str  # of the run, as KFP names it
    outcome: str  # succeeded, failed, terminated (by a person) or lost (a step's pod was killed from outside)
    failures: Mapping[str, list[str]]  # why each failed step did, several lines each
    notes: list[str]  # what the exit task says, the newest checkpoint, how to go on
    explained: bool  # whether the server gave the logs


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
    found = logs.workflow(server, run.run_id)
    if found.get("status", {}).get("compressedNodes"):
        return (
            "KFP's server shows no further progress: the run's Workflow is longer than 1 MiB, and the server does not "
            "read its packed status. The run itself goes on; its end is seen here, its steps in the UI's graph"
        )
    waiting = [pod for pod in logs.pods(found).values() if pod.phase == "Pending" and pod.message]
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
        return Ended(run.state, "succeeded", {}, [], True)
    pods = logs.pods(logs.workflow(server, run.run_id))
    failures: dict[str, list[str]] = {name: [] for name, state, _ in states(run) if state == "FAILED"}
    said, checkpoints, explained = [], [], bool(pods)
    for pod in pods.values():
        if not pod.failed and pod.step != STEPS[-1]:
            continue
        try:
            lines = logs.read(server, run.run_id, pod)
        except DraftModelError:
            lines, explained = [], False
        checkpoints += [found[0] for line in lines if (found := _CHECKPOINT.search(line))]
        if pod.failed:
            failures[pod.step] = [*filter(None, [pod.message]), *logs.reason(pod, lines)]
        else:
            said += logs.own_lines(lines)[-6:]
    if checkpoints and not any("checkpoint" in line for line in said):
        said.append(f"newest {checkpoints[-1]}")
    if not any("Retry" in line for line in said):
        said.append("Retry in KFP's UI runs what did not succeed; a training goes on from its newest checkpoint.")
    history = [status.state for status in run.state_history or ()]
    while "RUNNING" in history:  # of Retry's last attempt alone
        history = history[history.index("RUNNING") + 1 :]
    terminated = run.state == "CANCELED" or "CANCELING" in history
    lost = any(pod.lost for pod in pods.values())
    return Ended(run.state, "terminated" if terminated else "lost" if lost else "failed", failures, said, explained)
