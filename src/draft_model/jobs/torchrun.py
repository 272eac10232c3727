"""torchrun that ends without a traceback of its own: its processes have said already why they ended."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from draft_model.doors import ERROR_FILE
from draft_model.processes import end_with_parent

STOP_SECONDS = 600
"""Longest time that processes have after SIGTERM to finish their step and save; torchrun's own limit is 30 s."""

TERMINATION_LOG = "DRAFT_MODEL_TERMINATION_LOG"
"""Environment variable: the file whose content Kubernetes shows as the reason of a container's end."""
_TERMINATION_BYTES = 4096


def main() -> int:
    """Runs torchrun, and leaves the user's mistake that ended it, if one did, where the job's coordinator finds it.

    Returns:
        What `torchrun` returns.
    """
    if path := os.environ.get(ERROR_FILE):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    code = torchrun()
    if path and code:
        _tell(Path(path))
    return code


def _tell(error: Path) -> None:
    """Puts the problems into the pod's log, and into its status where there is one."""
    end = os.environ.get(TERMINATION_LOG)
    if not end or not error.exists():
        return
    problems = json.loads(error.read_text(encoding="utf-8"))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    while len(text := json.dumps({"problems": problems}).encode()) > _TERMINATION_BYTES:
        longest = max(problems, key=len)
        problems[problems.index(longest)] = longest[: len(longest) // 2] + " ..."
    Path(end).write_bytes(text)


def torchrun() -> int:
    """Runs torchrun on this process's arguments.

    Returns:
        0, or what the first process that failed ended with; 128 + the signal's number where a signal ended it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))
    try:
        run()
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return 128 + int(signal.Signals(stopped.sigval))
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
