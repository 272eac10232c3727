"""What all entry points share (command line, KFP component, job pod): logs, and how a process ends."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from draft_model.errors import DraftModelError, without_credentials
from draft_model.processes import end_with_root
from draft_model.scratch import scratch_folder

USER_ERROR, TERMINATED = 2, 128 + signal.SIGTERM
# Environment variables: where a process of a job leaves its problems for the one that started it; where the KFP
# components put their scratch folders (default: the machine's temporary folder).
ERROR_FILE, WORK_FOLDER = "DRAFT_MODEL_ERROR_FILE", "DRAFT_MODEL_WORK"

_NO_SPACE = (
    "make room there (df -h, df -i), or work on another disk: --work or --folder, TMPDIR, and for the pipeline's steps "
    f"{WORK_FOLDER}"
)
_PERMISSIONS = "change its permissions, or choose another"
_FILES = "raise the limit of open files (ulimit -n)"
_MACHINE = {
    errno.ENOSPC: _NO_SPACE, errno.EDQUOT: _NO_SPACE, errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: _PERMISSIONS, errno.EPERM: _PERMISSIONS, errno.EMFILE: _FILES, errno.ENFILE: _FILES,
    errno.EIO: "the disk fails (dmesg): work on another",
}  # fmt: skip
"""What to do where the operating system refuses a file."""


GC_THRESHOLD = gc.get_threshold()  # as Python has it


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(without_credentials(super().format(record)))


def spare_libraries() -> None:
    """Keeps the garbage collector off the objects of libraries, which stay: a third of a process's start and end.

    `target.load_model` sets GC_THRESHOLD again: cycles may hold tensors.
    """
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)


def set_up() -> None:
    """Our own log lines to standard error, other libraries' from warnings on; and variables without a line break."""
    spare_libraries()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(asctime)s %(message)s", "%H:%M:%S"))
    # By force, because KFP's executor has set up its own, which shows every library at INFO.
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for ours in ("draft_model", "kfp_pipeline"):
        logging.getLogger(ours).setLevel(logging.INFO)
    logging.getLogger("botocore.credentials").setLevel(logging.CRITICAL)  # a traceback before our own sentence
    # A Secret made by `echo` ends with a line break: no address and no header may have one.
    for name, value in list(os.environ.items()):
        if name.startswith(("AWS_", "HF_", "MLFLOW_")) and value != value.strip():
            os.environ[name] = value.strip()


def raise_on_sigterm() -> None:
    """Turns SIGTERM, and SIGHUP of a closed terminal, into SystemExit, so that `finally` ends what was started."""

    def terminate(*_: object) -> None:
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, terminate)


def user_error(error: BaseException) -> DraftModelError | None:
    """The problems of an exception that the user can put right; None for a fault of ours."""
    if isinstance(error, DraftModelError):
        return error
    if (
        isinstance(error, OSError)
        and error.errno in _MACHINE
        and (error.filename or _MACHINE[error.errno] == _NO_SPACE)
    ):
        return DraftModelError(f"{error.filename or 'a disk'}: {error.strerror}; {_MACHINE[error.errno]}")
    # Of safetensors, which is not imported here.
    if type(error).__name__ == "SafetensorError" and (code := re.search(r"os error (\d+)", str(error))):
        return DraftModelError(f"a disk: {error}; {_MACHINE.get(int(code[1]), _NO_SPACE)}")
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
        return DraftModelError(f"{error.strerror}; {_NO_SPACE}")
    return None


def report(error: DraftModelError) -> None:
    """Prints the problems to standard error, or writes them to ERROR_FILE for the process that set it."""
    if path := os.environ.get(ERROR_FILE):
        # Several processes may fail at once, and the first end makes torchrun stop the others.
        own = Path(f"{path}.{os.getpid()}")
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(error.problems), encoding="utf-8")
        own.replace(path)
    else:
        print(f"error: {printable(str(error))}", file=sys.stderr)


def printable(text: str) -> str:
    """Text of any origin for a terminal: control characters, which could be escape sequences, written out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def exit_code(work: Callable[[], None]) -> int:
    """Runs an entry point's work; SystemExit passes through.

    Returns:
        0; 2 for a user's mistake, without a traceback; 130 after Ctrl-C; 1 for a fault of ours, with its traceback.
    """
    set_up()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have bytes that the locale's encoding cannot write
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        work()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if (mistake := user_error(error)) is None:
            print(printable(without_credentials(traceback.format_exc())), file=sys.stderr, end="")
            return 1
        report(mistake)
        return USER_ERROR
    return 0


@contextmanager
def step(name: str) -> Iterator[Path]:
    """Runs the body of a KFP component in a scratch folder below DRAFT_MODEL_WORK, without tracebacks for mistakes."""
    set_up()
    raise_on_sigterm()
    end_with_root()
    if name != "clean-up" and (path := os.environ.get(ERROR_FILE)) and Path(path).exists():
        # kfp.local starts steps that do not depend on the one that failed.
        print("not started, since another step of this run has failed", file=sys.stderr)
        raise SystemExit(USER_ERROR)
    try:
        with scratch_folder(name, os.environ.get(WORK_FOLDER)) as folder:
            yield folder
    except Exception as error:
        if (mistake := user_error(error)) is None:
            raise
        report(mistake)
        raise SystemExit(USER_ERROR) from None
