"""Follows a run: the states of its tasks as they change, until it has ended.

Tasks are those of the pipeline's version that the run is of, so that what has not begun yet is seen too. KFP's own
nodes (drivers, executors, loops) are not shown; tasks of a loop are, with how many of them have ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from graphlib import TopologicalSorter
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from draft_model.errors import DraftModelError
from kfp_pipeline.client import TIMEOUT, NotLetIn, Server, ServerAway

logger = logging.getLogger(__name__)

SUCCEEDED = "SUCCEEDED"
ENDS = (SUCCEEDED, "FAILED", "CANCELED", "SKIPPED")
PAUSES = (0.5, 10.0)
"""Seconds between two looks: at first, when states change often, and later."""
PATIENCE = timedelta(minutes=30)
"""A server may be away for so long."""

_WAITING = "waiting"
# Of the states of a loop's tasks, the first that any of them has is shown.
_FIRST = ("FAILED", "RUNNING", "PENDING", "CANCELING", "PAUSED", "CANCELED", SUCCEEDED, "SKIPPED")
_STYLES = {"FAILED": "red", "RUNNING": "cyan", SUCCEEDED: "green"}


@dataclass(frozen=True)
class Task:
    """One of the pipeline's tasks in a run.

    Attributes:
        name: as in the pipeline.
        state: as KFP names it; "waiting" before it has begun.
        ended: of the tasks of this name in a loop, how many have.
        total: tasks of this name.
        seconds: since it began, up to its end.
        error: what KFP says of its failure; often nothing.
    """

    name: str
    state: str = _WAITING
    ended: int = 0
    total: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def progress(self) -> str:
        """State in words."""
        return self.state if self.total < 2 else f"{self.state} ({self.ended} of {self.total} ended)"


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        state: of the run.
        error: what KFP says of the run as a whole; often nothing.
        failed: the tasks that failed.
    """

    state: str
    error: str
    failed: list[Task]


def watch(server: Server, run_id: str) -> Ended:
    """Shows the states of a run's tasks on standard error until the run has ended.

    On a terminal as a table that changes, elsewhere as a line for each change.

    Raises:
        DraftModelError: where there is no such run, or the server is away for longer than PATIENCE.
    """
    with _screen() as screen:
        for run, names in _looks(server, run_id, screen):
            tasks = _tasks(run, names)
            screen.show(run.state, tasks)
    failed = [task for task in tasks if task.state == "FAILED"]
    return Ended(run.state, _error(run), failed)


def _looks(server: Server, run_id: str, screen: _Screen) -> Iterator[tuple[Any, list[str]]]:
    """The run as the server tells it, again and again, the ended one last; and the names of its tasks."""
    pause, longest = PAUSES
    away: float | None = None
    names: list[str] | None = None
    while True:
        try:
            with server.asked():
                run = server.client.runs.run_service_get_run(run_id, _request_timeout=TIMEOUT)
            names = _names(server, run) if names is None else names
        except (ServerAway, NotLetIn) as error:
            if away is None:
                away = time.monotonic()
                screen.tell(f"{error}\nThe run goes on; asking again for {PATIENCE.total_seconds() / 60:.0f} minutes.")
            elif time.monotonic() - away > PATIENCE.total_seconds():
                raise
        else:
            if away is not None:
                screen.tell("The server answers again.")
                away = None
            yield run, names
            if run.state in ENDS:
                return
        time.sleep(pause)
        pause = min(pause * 1.5, longest)


def _names(server: Server, run: Any) -> list[str]:
    """The tasks of the run's pipeline in the order in which they can run; none where the server does not say."""
    spec = run.pipeline_spec
    if reference := run.pipeline_version_reference:
        try:
            with server.asked():
                spec = server.client.pipelines.pipeline_service_get_pipeline_version(
                    reference.pipeline_id, reference.pipeline_version_id, _request_timeout=TIMEOUT
                ).pipeline_spec
        except (ServerAway, NotLetIn):
            raise
        except DraftModelError as error:  # deleted since; the run does not need it any more
            logger.warning("the run's tasks are not known: %s", error)
    spec = (spec or {}).get("pipeline_spec", spec or {})  # nested where there is a platform's part beside it
    return list(_in_order(spec, spec.get("root", {})))


def _in_order(spec: Mapping[str, Any], component: Mapping[str, Any]) -> Iterator[str]:
    tasks = component.get("dag", {}).get("tasks", {})
    graph = {name: task.get("dependentTasks", ()) for name, task in tasks.items()}
    for name in TopologicalSorter(graph).static_order():
        inner = spec["components"].get(tasks[name]["componentRef"]["name"], {})
        if "dag" in inner:  # a loop, a condition, an exit handler
            yield from _in_order(spec, inner)
        else:
            yield name


def _tasks(run: Any, names: list[str]) -> list[Task]:
    details = (run.run_details and run.run_details.task_details) or []
    by_name: dict[str, list[Any]] = {name: [] for name in names}
    parents = {detail.task_id: detail for detail in details}
    errors: dict[str, str] = {}
    for detail in details:
        if detail.display_name in by_name:
            by_name[detail.display_name].append(detail)
        error, owner = _error(detail), detail
        while error and owner and owner.display_name not in by_name:  # an executor's error is its task's
            owner = parents.get(owner.parent_task_id)
        if error and owner:
            errors.setdefault(owner.display_name, error)
    return [_task(name, found, errors.get(name, "")) for name, found in by_name.items()]


def _task(name: str, details: list[Any], error: str) -> Task:
    if not details:
        return Task(name)
    states = [detail.state for detail in details]
    state = next((state for state in _FIRST if state in states), _WAITING)
    starts = [detail.start_time for detail in details if _is_time(detail.start_time)]
    ended = [detail.end_time for detail in details if detail.state in ENDS and _is_time(detail.end_time)]
    seconds = 0.0
    if starts:
        end = max(ended) if len(ended) == len(details) else datetime.now(UTC)
        seconds = max((end - min(starts)).total_seconds(), 0.0)
    return Task(name, state, sum(s in ENDS for s in states), len(states), seconds, error)


def _is_time(at: datetime | None) -> bool:
    """KFP writes 1970 for what has not been yet."""
    return at is not None and at.year > 1970


def _error(record: Any) -> str:
    """What KFP says of the failure of a run or task."""
    history = [status.error for status in reversed(record.state_history or []) if status.error]
    return next((error.message for error in (record.error, *history) if error and error.message), "")


class _Screen:
    """Lines on standard error, one for each task that changes."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def show(self, state: str, tasks: list[Task]) -> None:
        for task in tasks:
            if task.progress != self._seen.get(task.name, _WAITING):
                took = f" after {_duration(task.seconds)}" if task.state in ENDS and task.seconds else ""
                logger.info("%s: %s%s", task.name, task.progress, took)
            self._seen[task.name] = task.progress

    def tell(self, text: str) -> None:
        logger.info("%s", text)


class _LiveScreen(_Screen):
    """A table on a terminal."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, state: str, tasks: list[Task]) -> None:
        table = Table("task", "state", "time", title=f"run: {state}", title_justify="left")
        for task in tasks:
            style = _STYLES.get(task.state, "dim" if task.state == _WAITING else "")
            table.add_row(task.name, task.progress, _duration(task.seconds) if task.seconds else "", style=style)
        self._live.update(table, refresh=True)

    def tell(self, text: str) -> None:
        self._live.console.print(text)


@contextmanager
def _screen() -> Iterator[_Screen]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Screen()
        return
    with Live(console=console, auto_refresh=False) as live:
        yield _LiveScreen(live)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
