"""Training jobs in processes of their own: what they give, and how they end when something or somebody ends them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file
from training.case import Trained

from draft_model import jobs
from draft_model.errors import DraftModelError
from draft_model.training import job

LONG = {"num_epochs": 16, "eval_interval": 16, "save_interval": 4}  # 52 steps: some are left when a signal comes


@pytest.fixture
def start():
    """Starts a job's coordinating process and waits until its log says something; ends all that is left of it."""
    started = []

    def start(config, text):
        code = (
            "import sys\n"
            "from draft_model import entrypoint, jobs\n"
            "from draft_model.training import TrainConfig\n"
            "sys.exit(entrypoint.exit_code(lambda: print(jobs.run(TrainConfig.from_json(sys.argv[1])))))\n"
        )
        command = [sys.executable, "-c", code, config.to_json()]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        log = []
        for line in process.stderr:
            log.append(line)
            if text in line:
                return process, log
        raise AssertionError(f"{text!r} was never logged:\n{''.join(log)}")

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stderr.close()


def processes_below(process):
    return psutil.Process(process.pid).children(recursive=True)


def losses_of(records):
    return np.array([record["loss"] for record in records])


def test_two_processes_train_as_one_does(train, plain, tmp_path):
    one = plain
    two = Trained(jobs.run(train.config(number_of_gpu_to_use_draft_model_training=2, draft_micro_batch_size=1)))
    assert two.record["world_size"] == 2
    for part in ("log", "validation"):
        np.testing.assert_allclose(losses_of(two.record[part]), losses_of(one.record[part]), rtol=0, atol=1e-5)
    assert two.checkpoints == one.checkpoints
    assert two.record["tokens"] == one.record["tokens"]
    ones, twos = (load_file(f"{run.output}/epoch_4/training_state/state.safetensors") for run in (one, two))
    for name, tensor in ones.items():
        if name.startswith("weight."):
            np.testing.assert_allclose(twos[name], tensor, rtol=0, atol=1e-5, err_msg=name)

    # What two began, one goes on with.
    output = shutil.copytree(two.output, tmp_path / "begun")
    (output / "checkpoints.json").write_text('["epoch_1", "epoch_2"]')
    resumed = train(str(output), resume="true")
    assert resumed.losses.keys() == one.losses.keys()
    np.testing.assert_allclose(losses_of(resumed.record["log"]), losses_of(one.record["log"]), rtol=0, atol=1e-5)


def test_mistakes_that_only_the_job_can_see_reach_the_caller_as_they_were_told(train, plain, inputs, capfd):
    with pytest.raises(DraftModelError) as caught:
        jobs.run(train.config(plain.output, dataset=inputs.other, seed=3, resume="true"))
    assert [problem.split(" is ")[0] for problem in caught.value.problems] == ["resume: seed", "resume: the data set"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_killed_process_is_told(train, start):
    config = train.config(**LONG)
    process, _ = start(config, "checkpoint epoch_4")
    (child,) = processes_below(process)
    child.kill()
    _, rest = process.communicate()
    assert process.returncode == 2
    assert "error: the training job ended with exit code -9" in rest
    assert "lack of memory" in rest
    assert "Traceback" not in rest


def test_a_signal_to_the_coordinating_process_ends_the_job_after_a_checkpoint(train, start):
    config = train.config(**LONG)
    process, _ = start(config, "step 5, ")
    (child,) = processes_below(process)
    process.terminate()
    _, rest = process.communicate()
    assert process.returncode == 143
    assert not psutil.pid_exists(child.pid)
    assert "Traceback" not in rest
    (name,) = json.loads((train.folder / config.output / "checkpoints.json").read_text())
    assert f"checkpoint {name}: " in rest


def instead(monkeypatch, body):
    """Has the job's process do something else than train."""
    code = f"import json, os, pathlib, signal, sys\n{body}"
    monkeypatch.setattr(jobs, "command", lambda world: [sys.executable, "-c", code])


@pytest.fixture
def ctrl_c():
    """SIGINT as in a terminal; where the tests run in the background, a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_job(train, monkeypatch, tmp_path):
    note = tmp_path / "pid"
    instead(
        monkeypatch,
        f"pathlib.Path({str(note)!r}).write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "signal.pause()",
    )
    with pytest.raises(KeyboardInterrupt):
        jobs.run(train.config())
    assert not psutil.pid_exists(int(note.read_text()))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "exit code -9.*lack of memory"),
        ("sys.exit(137)", "exit code 137.*lack of memory"),
        ("os.kill(os.getpid(), signal.SIGBUS)", "exit code -7.*/dev/shm"),
        ("sys.exit(1)", "exit code 1: its own messages are above$"),
        ("", "exit code 0: it has left no result"),
    ],
)
def test_a_job_that_ends_without_a_result_is_told(train, monkeypatch, body, told):
    instead(monkeypatch, body)
    with pytest.raises(DraftModelError, match=told):
        jobs.run(train.config())


def test_a_result_of_an_earlier_job_is_not_taken_for_this_ones(train, monkeypatch):
    config = train.config()
    config.work.mkdir(parents=True)
    (config.work / "result.json").write_text(json.dumps(asdict(job.run(config))))
    instead(monkeypatch, "")
    with pytest.raises(DraftModelError, match="exit code 0"):
        jobs.run(config)


def test_two_runs_in_a_row_share_no_error_file(train, monkeypatch):
    """An orphan of the first may still write when the second runs."""
    instead(monkeypatch, "pathlib.Path(os.environ['DRAFT_MODEL_ERROR_FILE']).write_text(json.dumps(['a: bad']))")
    with pytest.raises(DraftModelError, match="a: bad"):
        jobs.run(train.config())
    instead(monkeypatch, "sys.exit(1)")
    with pytest.raises(DraftModelError, match="exit code 1"):
        jobs.run(train.config())
