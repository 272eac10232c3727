"""Going on from a checkpoint: to the bit, from the newest whole one, and only where that means something."""

import json
import logging
import os
import shutil
import signal
from functools import partial

import pytest
import torch

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.training import job
from draft_model.training.trainer import Interrupted
from training.case import when_logged


class Crash(Exception):
    """The process dies here."""


def crash():
    raise Crash


terminate = partial(os.kill, os.getpid(), signal.SIGTERM)


def interrupted_at(train, step, **settings):
    """A training that was asked to stop while its step was under way; gives its output."""
    config = train.config(**settings)
    with when_logged(f"step {step}, ", terminate), pytest.raises(Interrupted):
        job.run(config)
    return config.output


def position(checkpoint):
    return json.loads(storage.read_bytes(f"{checkpoint}/training_state/position.json"))


def cut(path, size=-10):
    """Damages a file: its last bytes are lost."""
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("step", [1, 5, 12])
def test_sigterm_saves_the_step_and_resuming_repeats_the_rest_to_the_bit(train, plain, step):
    output = interrupted_at(train, step)
    newest = json.loads(storage.read_bytes(f"{output}/checkpoints.json"))
    assert position(f"{output}/{newest[-1]}")["step"] == step
    assert not storage.exists(f"{output}/final")
    resumed = train(output, resume="true")
    assert torch.are_deterministic_algorithms_enabled(), "on a CPU"
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert resumed.losses == plain.losses
    assert resumed.validations == plain.validations
    assert resumed.read("final/model.safetensors") == plain.read("final/model.safetensors")
    assert resumed.record["tokens"] == plain.record["tokens"]


@pytest.mark.parametrize(
    ("settings", "step"),
    [({"compute_dtype": "bfloat16"}, 8), ({"training_batch_size": 4, "draft_micro_batch_size": 4}, 4)],
)
def test_resuming_is_exact_in_bfloat16_and_however_the_target_is_batched(train, settings, step):
    undisturbed = train(**settings)
    resumed = train(interrupted_at(train, step, **settings), resume="true", **settings)
    assert resumed.losses == undisturbed.losses
    assert resumed.read("final/model.safetensors") == undisturbed.read("final/model.safetensors")


def test_a_training_that_is_interrupted_again_and_again_ends_as_one_that_was_not(train, plain):
    output = interrupted_at(train, 2)
    for step in (4, 9):
        interrupted_at(train, step, output=output, resume="true")
    resumed = train(output, resume="true")
    assert resumed.losses == plain.losses
    assert resumed.checkpoints == ["step_2", "epoch_1", "step_4", "epoch_2", "epoch_3", "epoch_4"]


def test_steps_that_taught_nothing_are_not_counted_as_updates(train):
    undisturbed = train(num_epochs=8)
    assert set(range(1, 20)) - undisturbed.losses.keys()  # nothing in the draft's vocabulary: nothing to log
    assert all(loss > 0 for losses in undisturbed.losses.values() for loss in losses if loss is not None)
    resumed = train(interrupted_at(train, 19, num_epochs=8), resume="true", num_epochs=8)
    assert resumed.losses == undisturbed.losses


def test_log_windows_survive_an_interruption(train):
    undisturbed = train(log_steps=5)
    output = interrupted_at(train, 5, log_steps=5)
    assert train(output, log_steps=5, resume="true").losses == undisturbed.losses


def test_an_interruption_in_the_last_step_is_none(train):
    config = train.config()
    with when_logged("step 13, ", terminate):
        assert job.run(config).steps == 13


def test_resuming_what_is_finished_changes_nothing(train, plain):
    finished = shutil.copytree(plain.output, train.folder / "finished")
    again = train(str(finished), resume="true")
    assert again.losses == plain.losses
    assert again.read("final/model.safetensors") == plain.read("final/model.safetensors")


@pytest.mark.parametrize("name", ["training_state/state.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(train, two_epochs, plain, caplog, name):
    cut(two_epochs / "epoch_2" / name)
    resumed = train(str(two_epochs), resume="true")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("epoch_2 is passed over" in warning for warning in warnings)
    assert "resumed from" in caplog.text
    assert "at step 3 of 13" in caplog.text
    assert resumed.losses == plain.losses
    assert resumed.checkpoints[-3:] == ["epoch_2", "epoch_3", "epoch_4"]


def test_nothing_to_resume_from_is_told(train, two_epochs):
    with pytest.raises(DraftModelError, match=r"resume: given 'true'.*no whole checkpoint.*resume=false"):
        train(resume="true")
    for name in ("epoch_1", "epoch_2"):
        cut(two_epochs / name / "model.safetensors")
    with pytest.raises(DraftModelError, match="no whole checkpoint"):
        train(str(two_epochs), resume="true")


def test_an_empty_output_goes_on_from_the_checkpoint_that_is_named(train, two_epochs, plain, caplog):
    resumed = train(resume="true", resume_from_checkpoint=str(two_epochs / "epoch_1"))
    assert resumed.losses == plain.losses
    assert resumed.checkpoints == ["epoch_2", "epoch_3", "epoch_4"]
    assert "at step 3 of 13" in caplog.text
    train(str(two_epochs), resume="true", resume_from_checkpoint=f"{plain.output}/epoch_1")  # its own comes before it
    assert "at step 6 of 13" in caplog.text


def test_a_draft_without_training_state_cannot_be_resumed(train, plain):
    with pytest.raises(DraftModelError, match=r"resume_from_checkpoint: .*without training state.*resume=false"):
        train(resume="true", resume_from_checkpoint=plain.result.final)


def test_a_position_that_would_mean_something_else_is_refused_and_all_that_differs_is_named(train, inputs, two_epochs):
    with pytest.raises(DraftModelError) as caught:
        train(str(two_epochs), resume="true", dataset=inputs.other, seed=3, draft_global_batch_size=8)
    seed, batch, dataset = caught.value.problems
    assert seed.startswith("resume: seed is 3 now and was 0")
    assert batch.startswith("resume: draft_global_batch_size is 8 now and was 4")
    assert dataset.startswith("resume: the data set is ")
    assert "resume=false with resume_from_checkpoint" in seed
    assert json.loads((two_epochs / "checkpoints.json").read_text()) == ["epoch_1", "epoch_2"]


def test_a_fresh_training_forgets_the_checkpoints_of_the_one_before_even_if_it_dies_early(train, plain, tmp_path):
    output = str(shutil.copytree(plain.output, tmp_path / "used"))
    with when_logged("step 1, ", crash), pytest.raises(Crash):
        train(output)
    with pytest.raises(DraftModelError, match="no whole checkpoint"):
        train(output, resume="true")
    assert not storage.exists(f"{output}/final")
    fresh = train(output, num_epochs=1, seed=5)
    assert fresh.checkpoints == ["epoch_1"]
    assert not storage.exists(f"{output}/epoch_4")
    assert list(fresh.losses) == [1, 2, 3]
    resumed = train(output, num_epochs=2, seed=5, resume="true")
    assert list(resumed.losses) == [1, 2, 3, 4, 5, 6]
