"""SIGKILL at any point: whoever goes on ends as one that nobody disturbed, to the bit."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from draft_model import storage
from draft_model.training.config import TrainConfig
from training.case import Trained
from training.processes import start, train_all, train_in, train_killed_in

KILLS = 6
LONG = {"num_epochs": 12, "eval_interval": 6}  # 39 steps
pytestmark = pytest.mark.timeout(600)


def again(config: TrainConfig) -> TrainConfig:
    """The next attempt of a run: it goes on from what there is, if there is anything."""
    return TrainConfig.from_json(json.dumps(json.loads(config.to_json()) | {"again": True}))


def wait_for(log, text, process):
    """Waits until a process has logged a text, or is gone."""
    while not (log.exists() and text in log.read_text()):
        if not process.is_alive():
            return
        time.sleep(0.005)


def test_killed_at_random_points_a_training_ends_as_one_that_was_not(train, tmp_path):
    undisturbed = train(**LONG)
    config, draw = train.config(**LONG), random.Random(0)
    killed = 0
    for attempt in range(KILLS):
        log = tmp_path / f"{attempt}.log"
        process = start(train_all, [again(config).to_json()], [0], log=log)
        reached = json.loads((tmp_path / "reached").read_text()) if (tmp_path / "reached").exists() else 0
        wait_for(log, f"step {reached + draw.randint(1, 4)}, ", process)
        time.sleep(draw.uniform(0, 0.03))  # anywhere in a step, a validation or the writing of a checkpoint
        process.kill()
        process.join()
        killed += process.exitcode == -9
        steps = [storage.read_manifest(f"{config.output}/{name}").properties["step"] for name in whole(config.output)]
        (tmp_path / "reached").write_text(json.dumps(max(steps, default=0)))
    assert killed == KILLS
    ended = Trained(train.run(again(config)))
    assert ended.losses == undisturbed.losses
    assert ended.read("final/model.safetensors") == undisturbed.read("final/model.safetensors")
    assert ended.record["tokens"] == undisturbed.record["tokens"]
    assert [name for name in ended.checkpoints if name not in whole(config.output)] == []


def whole(output):
    """Names of the checkpoints that have a manifest."""
    index = Path(output) / "checkpoints.json"
    names = json.loads(index.read_text()) if index.exists() else []
    return [name for name in names if (index.parent / name / "manifest.json").exists()]


LOCAL, STORE = "draft_model.storage.local:LocalFolder", "draft_model.storage.s3:S3Folder"
POINTS = {
    "the checkpoint is being written": ("draft_model.training.checkpoint:Path.mkdir", "epoch_2/training_state"),
    "nothing has arrived": (f"{LOCAL}.put", "epoch_2"),
    "all but the manifest has arrived": (f"{LOCAL}.write", "epoch_2/manifest.json"),
    "the list does not name it": (f"{LOCAL}.replace", "checkpoints.json"),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_a_checkpoint_is_written(train, plain, tmp_path, point):
    config = train.config()
    process = start(train_killed_in, config.to_json(), *POINTS[point], log=tmp_path / "log")
    process.join()
    assert process.exitcode == -9, (tmp_path / "log").read_text()
    assert "epoch_2" not in whole(config.output)
    assert Trained(train.run(again(config))).losses == plain.losses


@pytest.mark.parametrize(("place", "arrived"), [("put", False), ("write", True)])
def test_killed_while_a_checkpoint_is_uploaded(train, plain, tmp_path, object_store, caplog, place, arrived):
    output = f"s3://{object_store.bucket}/killed-{place}"
    config = train.config(output)
    name = "epoch_2/manifest.json" if arrived else "epoch_2"
    process = start(train_killed_in, config.to_json(), f"{STORE}.{place}", name, log=tmp_path / "log")
    process.join()
    assert process.exitcode == -9
    assert not storage.exists(f"{output}/epoch_2")
    assert storage.exists(f"{output}/epoch_2/model.safetensors") is arrived  # where it did, it counts for nothing
    assert Trained(train.run(again(config))).losses == plain.losses
    assert "epoch_2 is passed over" in caplog.text
    assert "epoch_2 was not whole and is removed" in caplog.text


def test_an_attempt_goes_on_whatever_resume_says_and_begins_where_there_is_nothing(train, plain, two_epochs):
    fresh = train.config()
    assert Trained(train.run(again(fresh))).losses == plain.losses
    ended = Trained(train.run(again(train.config(str(two_epochs)))))
    assert ended.losses == plain.losses
    assert ended.checkpoints == plain.checkpoints


def test_sigterm_in_other_processes_is_the_exit_code_143(train, plain, tmp_path):
    config = train.config()
    assert train_in(1, config, stop_at="step 5, ", log=tmp_path / "log") == [143]
    (name,) = [name for name in whole(config.output) if name.startswith("step_")]
    assert storage.read_manifest(f"{config.output}/{name}").properties["step"] in (5, 6)
    assert Trained(train.run(again(config))).losses == plain.losses


def test_a_job_whose_coordinator_is_killed_saves_its_step_and_ends(train):
    config = train.config(num_epochs=4000)
    coordinator = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'draft_model.training'])",
        ],
        env={**os.environ, "DRAFT_MODEL_JOB": config.to_json()},
        stderr=subprocess.PIPE,
        text=True,
    )
    with coordinator:
        for line in coordinator.stderr:
            if "step 3, " in line:
                break
        coordinator.kill()
        rest = coordinator.stderr.read()  # ends with the last process that could write to it
    (name,) = [name for name in whole(config.output) if name.startswith("step_")] or whole(config.output)[-1:]
    assert f"checkpoint {name}: " in rest
    assert storage.read_manifest(f"{config.output}/{name}").properties["step"] >= 3
