"""The states of a training job, the same for every back end, and the time limit that each of them has."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from draft_model.parameters import Parameters


class State(StrEnum):
    """Where a job is.

    QUEUED (not admitted, or suspended), STARTING (some pods do not run yet) and RUNNING may follow one another in any
    order, since a queue may suspend a job that runs. RESTARTING: the operator or torchrun starts processes again.
    SUCCEEDED, FAILED and DELETED are the ends.
    """

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RESTARTING = "RESTARTING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    DELETED = "DELETED"

    @property
    def ended(self) -> bool:
        """Whether nothing follows it."""
        return self in (State.SUCCEEDED, State.FAILED, State.DELETED)


@dataclass(frozen=True)
class Status:
    """A job's state with what is known about it.

    Attributes:
        state: the state.
        detail: a few words for the log: which pods run, why it failed.
    """

    state: State
    detail: str = ""


class Clock:
    """How long a job has been in each phase, held against its limits.

    The limits of queue and start are for one stay; the time of running adds up over interruptions.

    Args:
        parameters: queue_limit, start_limit and run_limit, in minutes.
        now: seconds, of any origin.
    """

    _LIMITS = {  # noqa: RUF012
        State.QUEUED: "queue_limit",
        State.STARTING: "start_limit",
        State.RUNNING: "run_limit",
        State.RESTARTING: "run_limit",
    }

    def __init__(self, parameters: Parameters, now: float) -> None:
        self._limits = {state: 60.0 * getattr(parameters, name) for state, name in self._LIMITS.items()}
        self._state: State | None = None
        self._entered = self._last = now
        self._running = 0.0

    def enter(self, state: State, now: float) -> str | None:
        """Takes note of the state at a moment.

        Returns:
            The parameter whose limit is exceeded, or None.
        """
        if self._state in (State.RUNNING, State.RESTARTING):
            self._running += now - self._last
        self._last = now
        if state is not self._state:
            self._state, self._entered = state, now
        if state.ended:
            return None
        spent = self._running if self._LIMITS[state] == "run_limit" else now - self._entered
        return self._LIMITS[state] if spent > self._limits[state] else None
