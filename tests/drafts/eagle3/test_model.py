"""Rotary tables and names: the draft is the layer that engines run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import llama

from draft_model.drafts import family_of
from draft_model.drafts.base import load_weights
from draft_model.drafts.eagle3.config import EAGLE3, draft_config_for
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.drafts.files import save_draft, vocabulary_of
from draft_model.drafts.layers import rotary_table, rotate
from draft_model.errors import DraftModelError
from draft_model.target.model import Target

from . import reference
from .case import random_draft, small_config
from .families import FAMILIES, ROPES, config_json, target_config

CPU = torch.device("cpu")
MIDLAYER = {*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
            "hidden_norm", "input_layernorm", "post_attention_layernorm"}  # fmt: skip
NAMES = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"} | {f"midlayer.{x}.weight" for x in MIDLAYER}


def heads(count: int, number: int, size: int) -> torch.Tensor:
    return torch.randn(count, number, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("positions", [50, 256, 400])  # within the original range, all, and past it
@pytest.mark.parametrize("kind", ROPES)
def test_rotation_equals_transformers_llama(kind, positions):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = {**ROPES[kind], "rope_theta": 500.0}
    shape = {"max_position_embeddings": 256, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    table = rotary_table(small_config(9, 9, rope_parameters=rope, **shape), CPU, positions, torch.float32)
    q, k = heads(positions, 4, 8), heads(positions, 2, 8)
    embedding = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, rope_parameters=rope, **shape))
    cos, sin = embedding(q, torch.arange(positions).unsqueeze(0))
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for ours, theirs in zip((rotate(q, table), rotate(k, table)), expected, strict=True):
        torch.testing.assert_close(ours, theirs[0].transpose(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "stretch"), [("default", 1.0), ("linear", 4.0)])
def test_rotation_equals_the_formula(kind, stretch):
    config = small_config(9, 9, rope_parameters={**ROPES[kind], "rope_theta": 500.0})
    x = heads(30, 4, config.head_dim)
    expected = reference.rope(x.double(), [t / stretch for t in range(30)], 500.0)
    ours = rotate(x, rotary_table(config, CPU, 30, torch.float32))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_drafts_rotary_table_is_the_targets(family, tmp_path):
    from transformers import AutoModelForCausalLM

    config = draft_config_for(config_json(tmp_path, family))
    embedding = AutoModelForCausalLM.from_config(target_config(family)).get_decoder().rotary_emb
    extra = ("full_attention",) if family == "gemma3_text" else ()
    cos, sin = (x[0] for x in embedding(torch.zeros(1), torch.arange(40).unsqueeze(0), *extra))
    if family == "gpt_oss":  # keeps one half of two that are equal
        cos, sin = (torch.cat((x, x), -1) for x in (cos, sin))
    torch.testing.assert_close(rotary_table(config, CPU, 40, torch.float32), torch.stack((cos, sin)))


def test_heads_that_do_not_divide_the_hidden_size_have_a_table():
    config = small_config(9, 9, num_attention_heads=6, num_key_value_heads=3)
    assert rotary_table(config, CPU, 5, torch.float32).shape == (2, 5, config.head_dim)


def random_model() -> Eagle3Draft:
    return random_draft(small_config(37, 23), torch.Generator().manual_seed(0))


def test_offsets_lead_to_the_targets_ids():
    draft = random_model()
    assert draft.target_ids.tolist() == draft.t2d.nonzero()[:, 0].tolist()


def new_draft(target: Target, seed: int, **changes) -> Eagle3Draft:
    config = draft_config_for({**target.config.to_dict(), **changes})
    known = torch.arange(target.config.vocab_size) % 2 == 0
    ids = known.nonzero()[:, 0]
    config = replace(config, draft_vocab_size=len(ids))
    draft = Eagle3Draft(config, known, ids - torch.arange(len(ids)))
    draft.initialise(seed, target)
    return draft


def test_a_new_draft_starts_from_what_the_target_knows():
    target = Target(llama(), (1, 3, 5))
    layer = target.decoder.layers[-1]
    with torch.no_grad():
        layer.input_layernorm.weight.uniform_(0.5, 2.0)
    first, again, other = new_draft(target, 3), new_draft(target, 3), new_draft(target, 4)
    for draft in (first, other):
        assert torch.equal(draft.lm_head.weight, target.head[draft.target_ids])
        assert torch.equal(draft.norm.weight, target.norm)
        hidden = draft.config.hidden_size
        assert torch.equal(draft.midlayer.self_attn.k_proj.weight[:, hidden:], layer.self_attn.k_proj.weight)
        assert torch.equal(draft.midlayer.self_attn.o_proj.weight, layer.self_attn.o_proj.weight)
        assert torch.equal(draft.midlayer.mlp.down_proj.weight, layer.mlp.down_proj.weight)
        assert torch.equal(draft.midlayer.hidden_norm.weight, layer.input_layernorm.weight)
        assert draft.midlayer.input_layernorm.weight.eq(1).all()  # of the embedding, which the layer does not know
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_a_new_eagle31_drafts_norms_give_rows_of_the_targets_size():
    target = Target(llama(), (1, 3, 5))
    with torch.no_grad():
        target.decoder.norm.weight.uniform_(0.5, 2.0)
    config = replace(draft_config_for(target.config.to_dict()), fc_norm=True, norm_output=True)
    draft = Eagle3Draft(config, torch.ones(64, dtype=torch.bool), torch.zeros(64, dtype=torch.int64))
    draft.initialise(3, target)
    size = float(draft.norm.weight[0])
    assert size != pytest.approx(1, abs=0.05)
    assert all(norm.weight.eq(size).all() for norm in (draft.norm, *draft.fc_norm))
    torch.testing.assert_close(draft.lm_head.weight, target.head * target.norm / size)
    # Muon moves every matrix by as much, so a layer of smaller weights would be lost in its first steps.
    assert torch.equal(draft.midlayer.mlp.down_proj.weight, target.last_layer["mlp.down_proj.weight"])


def test_a_draft_of_another_shape_keeps_its_random_layer():
    target = Target(llama(), (1, 3, 5))
    first, other = (new_draft(target, seed, intermediate_size=40) for seed in (0, 1))
    assert not torch.equal(first.midlayer.mlp.up_proj.weight, other.midlayer.mlp.up_proj.weight)
    assert torch.equal(first.midlayer.self_attn.o_proj.weight, other.midlayer.self_attn.o_proj.weight)


SWITCHED = {"fc_norm": True, "norm_before_fc": True, "norm_output": True, "aux_layers": (1, 2)}
OWN = {"input_norm.weight", "fc_norm.0.weight", "fc_norm.1.weight"}


@pytest.mark.parametrize(("changes", "names"), [({}, NAMES), (SWITCHED, NAMES | OWN)])
def test_saved_and_loaded_it_is_the_same(tmp_path, changes, names):
    draft = random_draft(small_config(37, 23, **changes), torch.Generator().manual_seed(0))
    save_draft(tmp_path, draft, torch.float32)
    assert load_file(tmp_path / "model.safetensors").keys() == names
    assert family_of(json.loads((tmp_path / "config.json").read_text())).name == draft.config.family
    again = load(tmp_path, draft.config)
    assert again.config == draft.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in draft.state_dict().items())


def test_a_draft_of_all_tokens_is_saved_without_a_vocabulary(tmp_path):
    draft = random_draft(small_config(37, 37), torch.Generator().manual_seed(0))
    save_draft(tmp_path, draft, torch.float32)
    assert load_file(tmp_path / "model.safetensors").keys() == NAMES - {"t2d", "d2t"}
    assert load(tmp_path, draft.config).target_ids.tolist() == list(range(37))


def load(folder, default) -> Eagle3Draft:
    config = json.loads((folder / "config.json").read_text())
    config, tensors = EAGLE3.read(config, load_file(folder / "model.safetensors"), "uri")
    shape = EAGLE3.adapt(default, config, "uri")
    draft = EAGLE3.create(shape, *vocabulary_of(tensors, shape))
    load_weights(draft, tensors, "uri")
    return draft


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    draft = random_model()
    save_draft(tmp_path, draft)
    (tmp_path / "config.json").write_text(json.dumps(replace(draft.config, intermediate_size=30).to_json()))
    with pytest.raises(DraftModelError, match=r"gate_proj.*\(28, 20\), not \(30, 20\)"):
        load(tmp_path, draft.config)
