"""What is kept of a run's job beside its output: so that nothing is trained twice, and a failure leaves its story.

<output>/training_job.json      attempts, their ends and reasons
<output>/logs/<job>/<pod>.log   the whole logs
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.jobs.states import State

FILE = "training_job.json"


@dataclass
class Record:
    """The story of one run's training job.

    Attributes:
        run_id: of the run.
        spec_sha256: of the first attempt, so that other settings are not taken for the same job.
        state: QUEUED before the first attempt has ended, RESTARTING where another one follows, or the end.
        attempts: one record per attempt that has ended: name, state, reason, problems.
    """

    run_id: str
    spec_sha256: str
    state: State = State.QUEUED
    attempts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What the last attempt told."""
        return list(self.attempts[-1]["problems"]) if self.attempts else []

    def add(self, name: str, state: State, reason: str, problems: list[str]) -> None:
        """Notes the end of an attempt."""
        self.state = state
        self.attempts.append({"name": name, "state": state.value, "reason": reason, "problems": problems})

    def save(self, output: str) -> None:
        """Writes it beside the output."""
        storage.write_bytes(storage.join(output, FILE), json.dumps(asdict(self), indent=1).encode())


def load(output: str, run_id: str, spec_sha256: str) -> Record | None:
    """The record of this run under these settings; None where there is none."""
    try:
        values = json.loads(storage.read_bytes(storage.join(output, FILE)))
        found = Record(**{**values, "state": State(values["state"])})
    except DraftModelError:
        return None
    except (ValueError, TypeError, KeyError):
        return None  # a damaged note is no reason not to train
    return found if (found.run_id, found.spec_sha256) == (run_id, spec_sha256) else None
