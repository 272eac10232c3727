"""Block drafts through the trainer: what holds for EAGLE-3 holds for them."""

import json
import logging

import pytest

from draft_model import drafts, storage
from training.processes import outcome, train_in
from training.test_resume import interrupted_at

SMALL = {"num_hidden_layers": 1, "markov_rank": 8, "num_anchors": 6, "block_size": 4}


@pytest.fixture(params=["dspark", "dflash"])
def settings(request, tmp_path):
    given = SMALL | ({} if request.param == "dspark" else {"markov_rank": 0})
    path = tmp_path / "draft.json"
    path.write_text(json.dumps(given))
    return {"draft_architecture": request.param, "draft_model_config": str(path)}


def test_it_learns_and_resumes_to_the_bit(train, settings, caplog):
    with caplog.at_level(logging.INFO, "draft_model"):
        whole = train(**settings)
    assert [record.message for record in caplog.records if "without effect" in record.message] == [
        f"ttt_length: without effect on {drafts.family(settings['draft_architecture']).title}"
    ]
    assert list(whole.validations.values())[-1][0] < 0.8 * whole.losses[1][0]
    resumed = train(interrupted_at(train, 5, **settings), resume="true", **settings)
    assert resumed.losses == whole.losses
    assert resumed.validations == whole.validations
    assert resumed.read("final/model.safetensors") == whole.read("final/model.safetensors")
    config = json.loads(storage.read_bytes(storage.join(whole.output, "final/config.json")))
    assert drafts.family_of(config).name == settings["draft_architecture"]


def test_how_steps_are_split_changes_nothing(train, settings):
    one, two = train(**settings), train(draft_micro_batch_size=1, training_batch_size=1, **settings)
    for step, losses in one.losses.items():
        assert two.losses[step] == pytest.approx(losses, rel=2e-3)


@pytest.mark.timeout(600)
def test_two_processes_train_the_draft_of_one(train, settings, tmp_path):
    """Sharing one target, or each with its own copy."""
    steps = {"total_steps": 6, "draft_micro_batch_size": 1}
    tp = 2 if settings["draft_architecture"] == "dspark" else 1
    config = train.config(number_of_gpu_to_use_draft_model_training=2, tp_size=tp, **steps, **settings)
    log = tmp_path / "log"
    assert train_in(2, config, log=log) == [0, 0], log.read_text()
    alone, shared = train(**steps, **settings), outcome(config)
    assert list(shared.losses) == list(alone.losses)
    for step, losses in alone.losses.items():
        assert shared.losses[step] == pytest.approx(losses, rel=2e-3)
