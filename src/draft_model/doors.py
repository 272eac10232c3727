"""What every door does alike (command line, KFP component, job pod): logs, and how a run ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from draft_model.errors import DraftModelError
from draft_model.processes import end_with_root

USER_ERROR = 2
TERMINATED = 128 + signal.SIGTERM

ERROR_FILE = "DRAFT_MODEL_ERROR_FILE"
"""Environment variable: where a process of a job leaves its problems for the one that started it."""


WORK_FOLDER = "DRAFT_MODEL_WORK"
"""Environment variable: where the KFP components put their scratch folders."""


def set_up_logging() -> None:
    """Our own log lines to standard error, with the time; other libraries' from warnings on."""
    # By force, because KFP's executor has set up its own, which shows every library at INFO.
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for ours in ("draft_model", "kfp_pipeline"):
        logging.getLogger(ours).setLevel(logging.INFO)


def raise_on_sigterm() -> None:
    """Turns SIGTERM, and SIGHUP of a closed terminal, into SystemExit, so that `finally` ends what was started."""

    def terminate(*_: object) -> None:
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, terminate)


def report(error: DraftModelError) -> None:
    """Tells the user's mistake: to the process that started this one where it asked for it, and to standard error."""
    if path := os.environ.get(ERROR_FILE):
        # Several processes may fail at once, and the first end makes torchrun stop the others.
        own = Path(f"{path}.{os.getpid()}")
        own.write_text(json.dumps(error.problems), encoding="utf-8")
        own.replace(path)
    else:
        print(f"error: {error}", file=sys.stderr)


def exit_code(work: Callable[[], None]) -> int:
    """Runs a door's work and says how it ended.

    Args:
        work: what the door is for.

    Returns:
        0; 2 for a user's mistake, told without a traceback; 130 after Ctrl-C; 1 for a fault of ours, with its
        traceback. SystemExit passes through.
    """
    set_up_logging()
    try:
        work()
    except DraftModelError as error:
        report(error)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def component(stage: str) -> Iterator[Path]:
    """The door of a KFP component: logs, a scratch folder, and an end without a traceback for a user's mistake.

    Args:
        stage: names the scratch folder.

    Yields:
        A scratch folder below DRAFT_MODEL_WORK (default: the machine's temporary folder), removed at the end.
    """
    set_up_logging()
    raise_on_sigterm()
    end_with_root()
    if stage != "clean-up" and (told := os.environ.get(ERROR_FILE)) and Path(told).exists():
        # kfp.local goes on with steps that do not come after the one that failed.
        print("not started, since another step of this run has failed", file=sys.stderr)
        raise SystemExit(USER_ERROR)
    with TemporaryDirectory(prefix=f"{stage}-", dir=os.environ.get(WORK_FOLDER)) as folder:
        try:
            yield Path(folder)
        except DraftModelError as error:
            report(error)
            raise SystemExit(USER_ERROR) from None
