"""torchrun's end says what its processes' ends said, and no more; and SIGTERM ends it wherever it waits."""

import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys
first = os.environ["RANK"] == "0"
"""
TORCHRUN = [sys.executable, "-m", "draft_model.jobs.torchrun"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("sys.exit(2)", 2),
        ("os.kill(os.getpid(), signal.SIGKILL) if first else signal.pause()", 128 + signal.SIGKILL),
        ("os.kill(os.getppid(), signal.SIGTERM) if first else None\nsignal.pause()", 128 + signal.SIGTERM),
    ],
)
def test_the_exit_code_is_that_of_the_process_that_failed_first(tmp_path, body, code):
    script = tmp_path / "script.py"
    script.write_text(PROGRAM + body)
    done = subprocess.run([*TORCHRUN, "--standalone", "--nproc-per-node=2", script], capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("node", "number"), [(0, signal.SIGTERM), (1, signal.SIGHUP)])
def test_a_process_that_waits_in_the_rendezvous_ends_at_once(node, number):
    """A pod that ignores SIGTERM there holds its GPUs for its whole grace period."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    rendezvous = ["--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    waiting = subprocess.Popen([*TORCHRUN, *rendezvous, "-m", "no.such.module"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while number not in handled(waiting.pid) or not connects(waiting.pid):
            assert waiting.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        waiting.send_signal(number)
        assert waiting.wait(5) == 128 + number
    finally:
        waiting.kill()
        waiting.wait()


def handled(pid: int) -> set[int]:
    """Signals that a process handles."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")]
    return {number for number in range(1, 65) if caught >> (number - 1) & 1}


def connects(pid: int) -> bool:
    """Whether a process has opened a socket, as it does for PyTorch's rendezvous."""
    with suppress(FileNotFoundError):  # closed since it was listed
        return any(str(link.readlink()).startswith("socket:") for link in Path(f"/proc/{pid}/fd").iterdir())
    return False
