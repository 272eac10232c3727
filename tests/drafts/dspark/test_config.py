"""Configuration and checkpoint: what is derived, what is refused, and what engines and other trainers write."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import llama, llama_config

from draft_model import drafts
from draft_model.drafts.base import check_proposals
from draft_model.drafts.dspark.config import feature_layers
from draft_model.drafts.dspark.model import START_SPREAD
from draft_model.drafts.files import save_draft, vocabulary_of
from draft_model.errors import DraftModelError
from draft_model.target.model import Target
from draft_model.training.checkpoint import Loaded, load_draft

from .case import random_case

TARGET = {**llama_config(num_hidden_layers=30).to_dict(), "model_type": "llama"}
FAMILIES = ["dflash", "dspark"]


def test_the_default_draft_of_a_target():
    shape = drafts.family("dspark").default_shape(TARGET)
    assert (shape.num_hidden_layers, shape.block_size, shape.proposals, shape.markov_rank) == (5, 7, 7, 256)
    assert shape.aux_layers == (2, 8, 15, 22, 28)  # z-lab's and SGLang's 1, 7, 14, 21, 27 after layer 0
    assert shape.draft_vocab_size == shape.vocab_size == 64
    flash = drafts.family("dflash").default_shape(TARGET)
    assert (flash.block_size, flash.proposals, flash.markov_rank, flash.enable_confidence_head) == (8, 7, 0, False)
    assert [drafts.family(name).default_shape(TARGET, 4).proposals for name in FAMILIES] == [4, 4]
    shallow = drafts.family("dspark").default_shape({**TARGET, "num_hidden_layers": 6})
    assert (shallow.num_hidden_layers, shallow.aux_layers) == (1, (1, 2, 3, 4, 5))
    assert feature_layers(4, 5) == (1, 2, 3)


def test_config_json_has_the_keys_that_engines_read():
    written = drafts.family("dspark").default_shape(TARGET).to_json()
    assert written["architectures"] == ["Qwen3DSparkModel"]
    assert written["model_type"] == "qwen3"
    expected = {
        "block_size": 7, "mask_token_id": 63, "target_layer_ids": [1, 7, 14, 21, 27], "num_target_layers": 30,
        "markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": True,
        "confidence_head_with_markov": True, "sample_from_anchor": True, "layer_types": ["full_attention"] * 5,
    }  # fmt: skip
    assert expected.items() <= written.items()
    flash = drafts.family("dflash").default_shape(TARGET).to_json()
    assert flash["architectures"] == ["DFlashDraftModel"]
    assert flash["dflash_config"] == {"mask_token_id": 63, "target_layer_ids": [1, 7, 14, 21, 27]}
    assert (flash["block_size"], flash["sample_from_anchor"]) == (8, False)
    assert not {"markov_rank", "target_layer_ids", "draft_vocab_size"} & flash.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_is_read_as_it_was_written(name, tmp_path):
    family = drafts.family(name)
    shape = family.adapt(family.default_shape(TARGET), {"num_hidden_layers": 2, "block_size": 5, "num_anchors": 9})
    draft = family.create(shape, *vocabulary_of({}, shape))
    draft.initialise(0, Target(llama(num_hidden_layers=30), shape.aux_layers))
    save_draft(tmp_path, draft)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    assert drafts.family_of(config) is family
    loaded = load_draft(Loaded("uri", tmp_path, *family.read(config, tensors, "uri"), None, None), TARGET)
    assert loaded.config == shape
    assert all(torch.equal(a.bfloat16(), b.bfloat16()) for a, b in zip(draft.parameters(), loaded.parameters(),
                                                                       strict=True))  # fmt: skip
    for form in ("vllm", "speculators"):
        target = {"name": "some/target", "architectures": [], "proposals": 3}
        read, weights = family.read(*family.export(*family.read(config, tensors, "uri"), form, target), "uri")
        assert drafts.family_of(read) is family
        assert family.adapt(family.default_shape(TARGET), read, "uri").to_json() | {"num_anchors": 9} == config
        assert weights.keys() == tensors.keys()


def test_tensors_are_named_as_engines_load_them():
    names = random_case(0, [5]).draft.state_dict().keys()
    layer = {f"self_attn.{x}.weight" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    layer |= {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}
    layer |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert names == {f"layers.{index}.{name}" for index in range(2) for name in layer} | {
        "fc.weight", "hidden_norm.weight", "norm.weight", "markov_head.markov_w1.weight",
        "markov_head.markov_w2.weight", "confidence_head.proj.weight", "confidence_head.proj.bias",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "given", "said"), [
    ("dspark", {"markov_rank": 0}, "DFlash has 0"),
    ("dflash", {"markov_rank": 16}, "DFlash has 0"),
    ("dflash", {"sample_from_anchor": True}, "DFlash has none"),
    ("dspark", {"markov_head_type": "rnn"}, "allowed: 'vanilla'"),
    ("dspark", {"mask_token_id": 64}, "at most 63"),
    ("dspark", {"block_size": 1}, ">= 2"),
    ("dspark", {"num_hidden_layers": "5"}, "whole number"),
    ("dspark", {"target_layer_ids": [3, 29]}, "0 to 28"),
    ("dspark", {"layer_types": ["sliding_attention"]}, "full_attention"),
    ("dspark", {"architectures": ["DFlashDraftModel"]}, "Qwen3DSparkModel"),
    ("dspark", {"hidden_size": 16}, "allowed: 32, the target's"),
    ("dspark", {"loss_decay_gamma": 0}, "number > 0"),
    ("dspark", {"dpace_alpha": 1.5}, "to 1"),
    ("dspark", {"enable_confidence_head": "no"}, "true, false"),
    ("dspark", {"target_layer_ids": []}, "ascending"),
    ("dspark", {"fc_norm": True}, "no setting of a block draft"),
    ("dspark", {"depth": 3}, "not a setting"),
])  # fmt: skip
def test_what_no_block_draft_can_have_is_refused(name, given, said):
    family = drafts.family(name)
    with pytest.raises(DraftModelError, match=said):
        family.adapt(family.default_shape(TARGET), given)


def test_the_vocabulary_is_whole(caplog):
    family = drafts.family("dspark")
    default = family.default_shape(TARGET)
    with caplog.at_level("INFO"):
        assert family.adapt(default, {"draft_vocab_size": 32}) == default
    assert "`draft_vocab_size` is without effect" in caplog.text
    with pytest.raises(DraftModelError, match="whole vocabulary"):  # another trainer's draft has a head of its own
        family.adapt(default, {"draft_vocab_size": 32}, "s3://theirs")


def test_a_block_is_served_as_it_is_trained():
    chain, block = (drafts.family(name).default_shape(TARGET) for name in ("eagle3", "dspark"))
    assert [check_proposals(chain, 16), check_proposals(block, 7)] == ["", ""]
    assert check_proposals(block, 3).startswith(
        "num_speculative_tokens: given 3, but the draft is trained for blocks of 7"
    )
    with pytest.raises(DraftModelError, match=r"num_speculative_tokens: given 8, .* use at most 7"):
        check_proposals(block, 8)


def test_tensors_of_another_architecture_are_refused():
    family = drafts.family("dspark")
    with pytest.raises(DraftModelError, match="gate_proj"):
        family.read({}, {"markov_head.gate_proj.weight": torch.zeros(1)}, "uri")


@pytest.mark.parametrize("name", FAMILIES)
def test_costs_count_the_parameters(name):
    family = drafts.family(name)
    shape = family.default_shape(TARGET)
    draft = family.create(shape, *vocabulary_of({}, shape))
    assert family.costs(shape, 7).parameters == sum(parameter.numel() for parameter in draft.parameters())


def test_a_fresh_draft_is_sure_of_nothing():
    family, model = drafts.family("dflash"), llama(num_hidden_layers=8)
    model.get_output_embeddings().weight.data.normal_(0.0, 3.0, generator=torch.Generator().manual_seed(0))
    shape = family.default_shape({**model.config.to_dict(), "model_type": "llama"})
    draft = family.create(shape, *vocabulary_of({}, shape))
    draft.initialise(0, target := Target(model, shape.aux_layers))
    state = torch.randn(500, shape.hidden_size, generator=torch.Generator().manual_seed(1))
    assert float((draft.norm(state) @ target.head.T).std()) == pytest.approx(START_SPREAD, rel=0.1)


def test_a_fresh_markov_head_has_no_effect_and_knows_which_tokens_are_alike():
    family, model = drafts.family("dspark"), llama(num_hidden_layers=8)
    model.get_input_embeddings().weight.data[5] = model.get_input_embeddings().weight.data[9]
    shape = family.adapt(family.default_shape({**model.config.to_dict(), "model_type": "llama"}), {"markov_rank": 4})
    draft = family.create(shape, *vocabulary_of({}, shape))
    draft.initialise(0, Target(model, shape.aux_layers))
    codes = draft.markov_head.markov_w1.weight
    assert torch.equal(codes[5], codes[9])
    assert not torch.equal(codes[5], codes[10])
    assert float(codes.square().mean()) == pytest.approx(1.0)
    assert not draft.markov_head.markov_w2.weight.any()
