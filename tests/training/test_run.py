"""A training on a tiny target: it learns, splits change nothing, and it writes what was promised."""

import json
import shutil
from collections import namedtuple
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open

from draft_model import storage
from draft_model.dataset import Split, load_vocabulary
from draft_model.errors import DraftModelError
from draft_model.training.optimizer import learning_rate
from draft_model.training.order import plan_steps
from training.case import DRAFT_VOCABULARY, QUICK, build_dataset

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 32, 4, 2, 8, 48  # of the tiny target


@pytest.fixture(scope="session")
def whole_vocabulary(inputs, tmp_path_factory):
    """URI of a small data set whose draft vocabulary is the target's, without a validation split."""
    return build_dataset(tmp_path_factory.mktemp("whole"), inputs.model, tiny.conversations(6))


def tensors_of(folder):
    with safe_open(folder + "/model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def by_step(losses):
    return np.array([losses[step] for step in sorted(losses)])


def assert_same_training(trained, other):
    np.testing.assert_allclose(by_step(trained.losses), by_step(other.losses), rtol=0, atol=1e-5)
    np.testing.assert_allclose(by_step(trained.validations), by_step(other.validations), rtol=0, atol=1e-5)


def test_a_draft_learns_a_small_data_set_by_heart(train, whole_vocabulary):
    trained = train(
        dataset=whole_vocabulary, draft_model_config="", num_epochs=40, draft_global_batch_size=2,
        log_steps=3, save_interval=40,
    )  # fmt: skip
    first, last = trained.record["log"][0], trained.record["log"][-1]  # an epoch each
    # The tiny target is so unsure that its entropy, which no draft gets below, is nearly all of the loss.
    assert all(after < before - 0.01 for before, after in zip(first["loss"], last["loss"], strict=True))
    assert all(after > before + 0.2 for before, after in zip(first["agreement"], last["agreement"], strict=True))
    assert min(last["agreement"]) > 0.55
    assert last["acceptance_length"] > max(2.0, first["acceptance_length"] + 0.5)
    assert trained.result.loss == last["loss"][0]
    # Without a validation split, the training's own acceptance length is told.
    assert trained.record["validation"] == []
    assert trained.result.acceptance_length == last["acceptance_length"]
    # A draft of the whole vocabulary is saved without a map.
    config = json.loads(trained.read("final/config.json"))
    assert config["draft_vocab_size"] == config["vocab_size"]
    assert not {"d2t", "t2d"} & tensors_of(trained.result.final).keys()


def test_another_seed_gives_another_training(train, plain):
    other = train(seed=1)
    assert other.losses.keys() == plain.losses.keys()
    assert all(other.losses[step] != plain.losses[step] for step in plain.losses)


@pytest.mark.parametrize("micro", [1, 4])
def test_accumulation_changes_nothing(train, plain, micro):
    assert_same_training(train(draft_micro_batch_size=micro), plain)


@pytest.mark.parametrize("size", [1, 5])
def test_the_targets_batch_changes_nothing(train, plain, size):
    assert_same_training(train(training_batch_size=size), plain)


def test_total_steps_ends_the_training_and_the_schedule(train):
    assert train(num_epochs=1, total_steps=8).result.steps == 8  # beyond the epochs
    trained = train(total_steps=5)
    log = trained.record["log"]
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5]
    assert [record["learning_rate"] for record in log] == pytest.approx(
        [learning_rate(step, 5, QUICK["learning_rate"], QUICK["warmup_ratio"], 0.0) for step in range(5)]
    )
    assert trained.checkpoints == ["epoch_1", "epoch_2"]
    assert list(trained.validations) == [3, 5]


def test_intervals_count_epochs_and_the_last_one_always_counts(train):
    trained = train(num_epochs=5, eval_interval=2, save_interval=3)
    # Thirteen conversations, four to a step: the epochs end after 3, 6, 9, 13 and 16 steps.
    assert list(trained.validations) == [6, 13, 16]
    assert trained.checkpoints == ["epoch_3", "epoch_5"]
    assert storage.read_manifest(trained.output + "/epoch_3").properties == {
        "step": 9,
        "epoch": 3,
        "run_id": "",
        "acceptance_length": None,
    }


def supervised(inputs):
    """How many positions of each training conversation the first unroll step learns from, by the definition."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
    t2d, _ = load_vocabulary(Path(inputs.dataset))
    counts = []
    for row in Split(Path(inputs.dataset) / "train"):
        with torch.no_grad():
            top = model(torch.from_numpy(row.input_ids).long()[None]).logits[0].argmax(-1)
        # The teacher at p speaks of token p + 1; the first is at 1, because step 0 reads a token ahead.
        counts.append(int((t2d[top[1:-1]] & torch.from_numpy(row.loss_mask[2:])).sum()))
    return np.array(counts)


def test_a_log_line_is_the_mean_over_the_tokens_of_its_steps(train, inputs, plain):
    trained = train(log_steps=5)
    assert list(trained.losses) == [5, 10, 13]
    split = Split(Path(inputs.dataset) / "train")
    counts = supervised(inputs)
    steps = islice(plan_steps(split.lengths, 4, 0), 13)
    weights = np.array([counts[step.conversations].sum() for step in steps])
    losses = by_step(plain.losses)
    for first, last in ((0, 5), (5, 10), (10, 13)):
        expected = np.average(losses[first:last], axis=0, weights=weights[first:last])[0]
        assert trained.losses[last][0] == pytest.approx(expected, abs=1e-9)


def test_what_is_saved_to_serve_has_the_names_shapes_and_types_that_engines_expect(plain):
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    vocabulary = json.loads(plain.read("final/config.json"))["vocab_size"]
    expected = {
        "fc.weight": (HIDDEN, 3 * HIDDEN),
        "midlayer.self_attn.q_proj.weight": (query, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": (key, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": (key, 2 * HIDDEN),
        "midlayer.self_attn.o_proj.weight": (HIDDEN, query),
        "midlayer.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "midlayer.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "midlayer.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "midlayer.hidden_norm.weight": (HIDDEN,),
        "midlayer.input_layernorm.weight": (HIDDEN,),
        "midlayer.post_attention_layernorm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
        "lm_head.weight": (DRAFT_VOCABULARY, HIDDEN),
        "d2t": (DRAFT_VOCABULARY,),
        "t2d": (vocabulary,),
    }
    for name in (*plain.checkpoints, "final"):
        tensors = tensors_of(f"{plain.output}/{name}")
        assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
        types = {key: tensor.dtype for key, tensor in tensors.items()}
        assert types.pop("d2t") == torch.int64
        assert types.pop("t2d") == torch.bool
        assert set(types.values()) == {torch.bfloat16}
    ids = tensors["d2t"] + torch.arange(DRAFT_VOCABULARY)
    assert torch.equal(ids, tensors["t2d"].nonzero()[:, 0])


def test_the_tokenizer_lies_beside_the_weights_and_the_targets_weights_do_not(plain, inputs):
    from transformers import AutoTokenizer

    text = "alpha beta"
    ours, target = (AutoTokenizer.from_pretrained(folder) for folder in (plain.result.final, inputs.model))
    assert ours(text).input_ids == target(text).input_ids
    files = {file.path for file in storage.read_manifest(plain.result.final).files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json"} <= files
    assert sum(name.endswith(".safetensors") for name in files) == 1


def test_the_record_tells_what_was_trained(plain, inputs):
    record = plain.record
    lengths = Split(Path(inputs.dataset) / "train").lengths
    steps = islice(plan_steps(lengths, 4, 0), 13)
    assert record["tokens"] == sum(int(lengths[step.conversations].sum()) for step in steps)
    assert record["steps"] == 13
    assert record["epochs"] == 4.0
    assert record["world_size"] == 1
    assert record["parameters"]["learning_rate"] == 1e-2
    assert record["seconds"] > 0
    assert record["target"]["layers"] == 6
    assert record["dataset"]["draft_vocab_size"] == DRAFT_VOCABULARY
    assert plain.result.acceptance_length == record["validation"][-1]["acceptance_length"] >= 1.0


def test_only_tensors_and_json_are_kept_to_go_on_from(plain):
    files = {file.path for file in storage.read_manifest(plain.output + "/epoch_4").files}
    assert {name for name in files if name.startswith("training_state/")} == {
        "training_state/state.safetensors",
        "training_state/position.json",
    }
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".pth"))]


def test_a_draft_vocabulary_that_the_data_set_was_not_built_for_is_refused(train, tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"draft_vocab_size": 100}')
    with pytest.raises(DraftModelError, match=r"draft_model_config: draft_vocab_size is 100.*built for 128"):
        train(draft_model_config=str(path))


def test_conversations_that_fill_no_step_are_refused_with_the_largest_batch_that_they_fill(train):
    with pytest.raises(DraftModelError, match=r"draft_global_batch_size: given 60.*use at most 52"):
        train(draft_global_batch_size=60)
    assert train(draft_global_batch_size=52, draft_micro_batch_size=13).result.steps == 1


def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(train, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, (1 << 30) - 1000, 1000))
    with pytest.raises(DraftModelError, match=r"disk: .* has 0\.00 GB free, and 3 checkpoints .* need 0\.07 GB"):
        train(str(tmp_path / "out"))
    assert not storage.exists(str(tmp_path / "out/checkpoints.json"))


def test_inputs_that_are_not_there_are_refused_by_name(train, inputs, tmp_path):
    with pytest.raises(DraftModelError, match="nowhere"):
        train(dataset=str(tmp_path / "nowhere"))
    with pytest.raises(DraftModelError, match="dataset"):
        train(dataset=inputs.model)


def test_model_data_set_and_output_may_lie_in_object_storage(train, inputs, object_store, plain, tmp_path):
    uri = f"s3://{object_store.bucket}/run"
    for name, folder in (("model", inputs.model), ("dataset", inputs.dataset)):
        manifest = storage.read_manifest(folder)
        copy = shutil.copytree(folder, tmp_path / name)
        storage.publish(copy, f"{uri}/{name}", stage=manifest.stage, properties=manifest.properties)
    trained = train(f"{uri}/output", model=f"{uri}/model", dataset=f"{uri}/dataset", num_epochs=2)
    assert trained.checkpoints == ["epoch_1", "epoch_2"]
    resumed = train(f"{uri}/output", model=f"{uri}/model", dataset=f"{uri}/dataset", num_epochs=4, resume="true")
    assert resumed.checkpoints == ["epoch_1", "epoch_2", "epoch_3", "epoch_4"]
    assert storage.fetch(resumed.result.final, tmp_path / "final").joinpath("model.safetensors").is_file()
    # A longer schedule than at first gives other rates, so only what was trained before must agree.
    assert all(resumed.losses[step] == trained.losses[step] for step in trained.losses)
