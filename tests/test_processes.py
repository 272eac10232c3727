"""Processes end with the command that they belong to, however it ends."""

import signal
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_a_question_for_later(number):
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "stopped\n"
    assert process.returncode == 0
