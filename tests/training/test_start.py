"""resume=false with resume_from_checkpoint: an earlier draft's weights and vocabulary, and nothing else of it."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from draft_model.dataset import load_vocabulary
from draft_model.errors import DraftModelError
from draft_model.training.checkpoint import read_checkpoint
from draft_model.training.optimizer import learning_rate
from training.case import QUICK, changed


@pytest.fixture
def served(plain, tmp_path):
    """The undisturbed training's draft as another trainer would have it: weights and configuration, no manifest."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(plain.read("final/model.safetensors"))
    config = json.loads(plain.read("final/config.json"))
    del config["target_model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_weights_are_taken_and_optimizer_and_schedule_are_new(train, plain, caplog):
    started = train(resume_from_checkpoint=plain.result.final)
    assert f"the draft starts from the weights of {plain.result.final}" in caplog.text
    log = started.record["log"]
    assert [record["step"] for record in log] == list(range(1, 14))
    assert [record["learning_rate"] for record in log] == pytest.approx(
        [learning_rate(step, 13, QUICK["learning_rate"], QUICK["warmup_ratio"], 0.0) for step in range(13)]
    )
    # The first epoch sees the conversations of the other's first epoch, and knows them already.
    known, unknown = (np.mean([trained.losses[step][0] for step in (1, 2, 3)]) for trained in (started, plain))
    assert known < unknown - 0.03


def test_a_checkpoint_gives_no_more_than_its_served_weights(train, plain, served):
    from_checkpoint = train(resume_from_checkpoint=f"{plain.output}/epoch_4")
    assert from_checkpoint.losses == train(resume_from_checkpoint=str(served)).losses
    assert from_checkpoint.checkpoints == ["epoch_1", "epoch_2", "epoch_3", "epoch_4"]


def test_the_checkpoints_vocabulary_wins_over_the_data_sets(train, plain, inputs):
    ours, others = load_file(f"{plain.result.final}/model.safetensors"), load_vocabulary(Path(inputs.other))
    assert not torch.equal(ours["t2d"], others[0])
    started = train(dataset=inputs.other, resume_from_checkpoint=plain.result.final)
    for name in ("final", *started.checkpoints):
        tensors = load_file(f"{started.output}/{name}/model.safetensors")
        assert torch.equal(tensors["t2d"], ours["t2d"])
        assert torch.equal(tensors["d2t"], ours["d2t"])


def test_an_output_may_start_from_a_draft_of_its_own(train, plain, tmp_path):
    output = str(shutil.copytree(plain.output, tmp_path / "used"))
    started = train(output, num_epochs=1, resume_from_checkpoint=f"{output}/epoch_4")
    assert started.losses[1] == train(num_epochs=1, resume_from_checkpoint=f"{plain.output}/epoch_4").losses[1]
    assert started.checkpoints == ["epoch_1"]


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_not_opened(train, served, tmp_path, name):
    (served / "model.safetensors").unlink()
    (served / name).write_bytes(pickle.dumps({"fc.weight": Trap(tmp_path / "sprung")}))
    with pytest.raises(DraftModelError, match="is no checkpoint of a draft that can be read"):
        train(resume_from_checkpoint=str(served))
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_beside_the_training_state_is_not_opened(train, plain, tmp_path):
    checkpoint = shutil.copytree(f"{plain.output}/epoch_2", tmp_path / "checkpoint")
    for name in ("state.bin", "optimizer.pt", "model.bin"):
        (checkpoint / "training_state" / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert train(resume="true", resume_from_checkpoint=str(checkpoint)).losses == plain.losses
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kept", ["training_state", "training.json", "config.json"])
def test_a_folder_of_ours_needs_its_manifest_and_anothers_is_said_to_be_unchecked(
    train, plain, served, tmp_path, kept, caplog
):
    ours = tmp_path / "ours"
    shutil.copytree(f"{plain.output}/epoch_2", ours)
    (ours / "manifest.json").unlink()
    if kept != "training_state":
        shutil.rmtree(ours / "training_state")
    if kept == "config.json":
        (ours / "training.json").unlink()
    else:
        shutil.copyfile(served / "config.json", ours / "config.json")
    with pytest.raises(DraftModelError, match=r"written by this project and has no manifest\.json.*copy the whole"):
        read_checkpoint(str(ours), tmp_path / "work")
    read_checkpoint(str(served), tmp_path / "work")
    if kept == "config.json":  # another trainer went on from it and saved it by transformers
        config = json.loads((ours / "config.json").read_text())
        (ours / "config.json").write_text(json.dumps({**config, "transformers_version": "5.19.0"}))
        assert read_checkpoint(str(ours), tmp_path / "work").tensors
    assert f"{served} has no manifest.json: a draft of another trainer, taken unchecked" in caplog.text


def test_a_folder_that_is_not_there_is_told(train, tmp_path):
    with pytest.raises(DraftModelError, match="nowhere"):
        train(resume_from_checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("fc.weight"), "fc.weight is missing"),
        (lambda tensors: tensors.update({"norm.weight": torch.ones(31)}), r"norm\.weight: \(31,\), not \(32,\)"),
    ],
)
def test_weights_of_another_shape_are_refused_by_name(train, served, change, named):
    tensors = load_file(served / "model.safetensors")
    change(tensors)
    save_file(tensors, served / "model.safetensors")
    with pytest.raises(DraftModelError, match=named):
        train(resume_from_checkpoint=str(served))


def test_a_draft_of_another_target_is_refused_as_such(train, served):
    config = json.loads((served / "config.json").read_text())
    (served / "config.json").write_text(json.dumps(config | {"hidden_size": 64, "target_hidden_size": 64}))
    with pytest.raises(DraftModelError, match=r"resume_from_checkpoint: .*`hidden_size` is 64; allowed: 32, the"):
        train(resume_from_checkpoint=str(served))


def speculators_style(served, folder, **settings):
    """The same draft as the package speculators writes it: other names, the embeddings, a nested configuration."""
    from transformers import LlamaConfig

    folder.mkdir()
    tensors = load_file(served / "model.safetensors")
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    config = json.loads((served / "config.json").read_text())
    save_file({**renamed, "embed_tokens.weight": torch.zeros(config["vocab_size"], 32)}, folder / "model.safetensors")
    shape = {name: config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim",
             "num_key_value_heads", "vocab_size", "max_position_embeddings", "rope_parameters")}  # fmt: skip
    outside = {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": config["draft_vocab_size"],
        "norm_before_residual": False,
        "speculators_config": {"algorithm": "eagle3", "default_proposal_method": "greedy"},
        "speculators_model_type": "eagle3",
        "target_hidden_size": None,
        "transformer_layer_config": LlamaConfig(num_hidden_layers=1, **shape).to_diff_dict(),
    }
    (folder / "config.json").write_text(json.dumps(outside | settings))
    return folder


def test_a_draft_in_the_style_of_speculators_starts_the_same_training(train, plain, served, tmp_path):
    folder = speculators_style(served, tmp_path / "speculators")
    started = train(num_epochs=1, resume_from_checkpoint=str(folder))
    assert started.losses == train(num_epochs=1, resume_from_checkpoint=plain.result.final).losses


def test_a_draft_in_the_style_of_specforge_starts_the_same_training(train, plain, served, tmp_path):
    tensors = load_file(served / "model.safetensors")
    del tensors["t2d"]  # which follows from d2t
    save_file(tensors | {"embed_tokens.weight": torch.zeros(400, 32)}, served / "model.safetensors")
    config = json.loads((served / "config.json").read_text())
    left_out = ("eagle_config", "eagle_aux_hidden_state_layer_ids", "target_model_type", "rope_parameters")
    kept = {name: value for name, value in config.items() if name not in left_out}
    (served / "config.json").write_text(json.dumps(kept | {"rope_scaling": None, "use_cache": True, "pad_token_id": 0}))
    started = train(num_epochs=1, resume_from_checkpoint=str(served))
    assert started.losses == train(num_epochs=1, resume_from_checkpoint=plain.result.final).losses


def test_an_eagle31_draft_of_any_trainer_starts_the_same_training(train, inputs, tmp_path):
    shape = {**json.loads(Path(inputs.draft_config).read_text()), "eagle_aux_hidden_state_layer_ids": [1, 2, 3, 4, 5]}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    ours = train(num_epochs=1, draft_architecture="eagle3.1", draft_model_config=str(tmp_path / "shape.json"))
    config = json.loads(ours.read("final/config.json"))
    assert {name: config[name] for name in config if "norm" in name} == {
        "fc_norm": True, "norm_output": True, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    assert config["num_aux_hidden_states"] == 5
    started = train(num_epochs=1, resume_from_checkpoint=ours.result.final)
    assert started.record["draft"] == ours.record["draft"]
    served = tmp_path / "served"
    served.mkdir()
    (served / "model.safetensors").write_bytes(ours.read("final/model.safetensors"))
    own = {name: config[name] for name in ("fc_norm", "norm_output", "eagle_aux_hidden_state_layer_ids")}
    del config["target_model_type"]
    (served / "config.json").write_text(json.dumps(config))
    for folder in (served, speculators_style(served, tmp_path / "speculators", **own)):
        assert train(num_epochs=1, resume_from_checkpoint=str(folder)).losses == started.losses


def test_a_draft_of_other_maths_is_refused_by_name(train, served, tmp_path):
    folder = speculators_style(served, tmp_path / "speculators", norm_before_residual=True)
    with pytest.raises(DraftModelError, match="`norm_before_residual` is set"):
        train(resume_from_checkpoint=str(folder))


def test_the_checkpoints_vocabulary_wins_when_resuming_too(train, plain, inputs, tmp_path, two_epochs):
    """The data set is the same but for its vocabulary file, which an overwriting trainer would believe."""
    name = "vocabulary.safetensors"
    other = changed(inputs.dataset, tmp_path / "changed", lambda to: shutil.copy(f"{inputs.other}/{name}", to / name))
    resumed = train(str(two_epochs), dataset=other, resume="true")
    assert resumed.losses == plain.losses
    assert resumed.read("final/model.safetensors") == plain.read("final/model.safetensors")
