"""Processes end with the command that they belong to, however it ends."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from draft_model.processes import ROOT

CHILD = """
import os, signal, sys
from draft_model.processes import catch_sigterm, end_with_parent
with catch_sigterm() as stop:
    end_with_parent()
    print(os.getpid(), flush=True)
    while not stop():
        signal.sigtimedwait([], 0.05)
print("stopped", flush=True)
"""
PARENT = """
import os, subprocess, sys
from draft_model.processes import ROOT
os.environ[ROOT] = str(os.getpid())
subprocess.run(["sh", "-c", '"$0" -c "$1"; true', sys.executable, sys.argv[1]])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_ends_with_the_command_through_processes_of_others(number):
    command = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    pid = int(command.stdout.readline())
    command.send_signal(number)
    assert command.stdout.readline() == "stopped\n"
    command.wait()
    command.stdout.close()
    assert pid != command.pid


def test_a_process_whose_parent_was_gone_before_it_could_ask_ends_too():
    with subprocess.Popen(["true"]) as parent:
        pass
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=60,
                          env={**os.environ, ROOT: str(parent.pid)})  # fmt: skip
    assert done.stdout.endswith("\nstopped\n")


def test_an_orphan_that_waits_for_what_is_gone_is_killed():
    code = (
        "import signal\nfrom draft_model import processes\nprocesses.ORPHAN_SECONDS = 0.2\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprocesses.end_with_root()\nwhile True: signal.pause()"
    )
    with subprocess.Popen(["true"]) as parent:
        pass
    environment = {**os.environ, ROOT: str(parent.pid)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == -signal.SIGKILL


LOCAL_RUN = """
import subprocess
from draft_model.entrypoint import raise_on_sigterm
from kfp_pipeline.local import _no_orphans
raise_on_sigterm()
with _no_orphans(), subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"]):  # kfp waits, whatever is raised
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_local_run_alone_ends_its_steps(number):
    with subprocess.Popen([sys.executable, "-c", LOCAL_RUN], stdout=subprocess.PIPE, text=True) as run:
        sleeping = psutil.Process(int(run.stdout.readline()))
        run.send_signal(number)
        assert run.wait(60) == 128 + signal.SIGTERM
        assert not sleeping.is_running()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_a_question_for_later(number):
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "stopped\n"
    assert process.returncode == 0
