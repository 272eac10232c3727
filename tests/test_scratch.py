"""Scratch folders: gone at the end of a run, and after a kill at the start of the next."""

import os
import subprocess
import sys

from draft_model.scratch import scratch_folder, working_in

KILLED = """
import os, signal, sys
from draft_model.scratch import scratch_folder
with scratch_folder("train", sys.argv[1]) as folder:
    (folder / "model").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_scratch_of_killed_runs_is_swept_and_that_of_others_is_not(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment)
    (tmp_path / "draft-model-of-the-user").mkdir()
    (left,) = tmp_path.glob("draft-model-train-*")
    with working_in(left / "model"), scratch_folder("evaluate", str(tmp_path)) as first:
        assert left.is_dir()  # a job's process outlived the command
        with scratch_folder("train", str(tmp_path)) as second:
            assert first.is_dir()
            assert second.is_dir()
    with scratch_folder("train", str(tmp_path)):
        assert not left.exists()
        assert not first.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["draft-model-of-the-user"]
