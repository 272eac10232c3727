"""torchrun without tracebacks of its own: its processes have said why they ended; and SIGTERM always ends it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from draft_model.entrypoint import ERROR_FILE, spare_libraries
from draft_model.processes import end_with_parent

STOP_SECONDS = 600
"""Longest time that processes have after SIGTERM to finish their step and save; torchrun's own limit is 30 s."""

TERMINATION_LOG = "DRAFT_MODEL_TERMINATION_LOG"
"""Environment variable: the file whose content Kubernetes shows as the reason of a container's end."""
_TERMINATION_BYTES = 4096


def main() -> int:
    """Runs torchrun, and leaves the user's mistake that ended it, if one did, where the job's coordinator reads it.

    Returns:
        0, or what the first process that failed ended with; 128 + the signal's number where a signal ended it.
    """
    spare_libraries()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    _end_on_signals()
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))
    try:
        run()
        return 0
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        code = code if code > 0 else 128 - code
    except SignalException as stopped:
        code = 128 + int(signal.Signals(stopped.sigval))
    tell_kubernetes()
    return code


def _end_on_signals() -> None:
    """Ends this process at once on SIGTERM or SIGHUP while it has started no processes, which torchrun stops itself.

    It waits in a rendezvous then, with nothing to save. As a container's first process it would ignore the signals, and
    in the rendezvous' C++ code no Python handler runs; so a thread waits for them. torchrun replaces the handlers when
    it starts processes.
    """

    def end(number: int, _: object) -> None:
        os._exit(128 + number)

    def wait() -> None:
        while number := os.read(receive, 1)[0]:
            if signal.getsignal(number) is end:
                os._exit(128 + number)

    receive, send = os.pipe()
    os.set_blocking(send, False)
    signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    threading.Thread(target=wait, name="signals", daemon=True).start()


def tell_kubernetes() -> None:
    """Puts the problems that a process reported into the pod's log and status, where this is a job's pod."""
    end, error = os.environ.get(TERMINATION_LOG), Path(os.environ.get(ERROR_FILE, ""))
    if not end or not error.is_file():
        return
    problems = json.loads(error.read_text(encoding="utf-8"))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    while len(text := json.dumps({"problems": problems}).encode()) > _TERMINATION_BYTES:
        longest = max(problems, key=len)
        problems[problems.index(longest)] = longest[: len(longest) // 2] + " ..."
    Path(end).write_bytes(text)


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
