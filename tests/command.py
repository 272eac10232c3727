"""The program `draft-model`, run in the process of the tests, which has imported its libraries."""

import io
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest

from draft_model.cli import main


def draft_model(*arguments, **environment):
    """Runs a command with more variables; environment and handlers of signals are as before after it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as errors,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(os, "environ", {**os.environ, **environment})
        patch.setattr(sys, "argv", ["draft-model", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return SimpleNamespace(returncode=ended.value.code, stdout=out.getvalue(), stderr=errors.getvalue())
