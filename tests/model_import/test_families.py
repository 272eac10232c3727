"""Which models can be targets is decided by their structure: each family as a tiny random model of transformers'."""

import json
import shutil

import pytest
import tiny
import torch

from .case import change_config

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
SUPPORTED = {
    "LlamaConfig": {},
    "MistralConfig": {"sliding_window": 7},
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen2Config": {},
    "Qwen2MoeConfig": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "Qwen3Config": {"head_dim": 16},
    "Qwen3MoeConfig": {**EXPERTS, "num_experts": 4, "head_dim": 8},
    "GptOssConfig": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 7},
    "Phi3Config": {},
    "GemmaConfig": {"head_dim": 16},
    "Gemma2Config": {"head_dim": 16},
    "Gemma3TextConfig": {"head_dim": 16},
    "GraniteConfig": {"logits_scaling": 4.0},
    "CohereConfig": {"logit_scale": 0.25},
    "Olmo2Config": {},
    "SmolLM3Config": {},
    "Glm4Config": {"head_dim": 8},
}
REFUSED = {
    "GPT2Config": {"n_layer": 6, "n_head": 4, "n_embd": 32, "num_key_value_heads": None},
    "BloomConfig": {"n_layer": 6, "n_head": 4},
    "GPTNeoXConfig": {},
    "MambaConfig": {},
    "BertConfig": {},
}


def save(model_folder, name, **changes):
    """Replaces a folder's model by a random one of another family."""
    import transformers

    torch.manual_seed(0)
    settings = {key: value for key, value in {**SHAPE, **changes}.items() if value is not None}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    (model_folder / "model.safetensors").unlink()
    model.save_pretrained(model_folder)
    return model


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def drop(folder, name):
    from safetensors.torch import save_file

    kept = {key: value for key, value in tensors(folder).items() if key != name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_family_of_the_structure_is_imported_and_counted_exactly(model, name, bring):
    saved = save(model, name, **SUPPORTED[name])
    result = bring(pytorch_model_path=str(model))
    assert result.architecture == type(saved).__name__
    assert result.parameter_count == sum(weight.numel() for weight in set(saved.parameters()))


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_another_structure_is_refused(model, name, only):
    save(model, name, **REFUSED[name])
    problem = only(model)
    assert "Llama's structure" in problem


def test_logits_that_the_training_does_not_know_are_refused(model, only, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def squared(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = outputs.logits**2
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", squared)
    assert "its logits are no plain function of its head" in only(model)


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen3MoeConfig", "GptOssConfig", "Gemma2Config"])
@pytest.mark.parametrize("which", [0, 7, -1])
def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_the_tensor_named(model, name, which, only):
    save(model, name, **SUPPORTED[name])
    lost = sorted(tensors(model))[which]
    drop(model, lost)
    problem = only(model)
    assert "its weights lack " in problem
    assert lost in problem


def test_a_tied_head_is_nothing_that_lacks(model, bring):
    saved = save(model, "Qwen2Config", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors(model)
    assert bring(pytorch_model_path=str(model)).parameter_count == saved.num_parameters()


def test_many_missing_tensors_are_counted(model, only):
    change_config(model, num_hidden_layers=8)
    assert "model.layers.6.input_layernorm.weight" in only(model)
    assert " and 13 more" in only(model)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_refused(model, content, only):
    (model / "tokenizer.json").write_text(content)
    assert "its tokenizer cannot be loaded" in only(model)


def test_a_tokenizer_that_needs_its_own_code_is_refused_and_the_code_not_run(model, tmp_path, only):
    path = model / "tokenizer_config.json"
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    (model / "code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    (model / "tokenizer.json").rename(model / "vocab.json")
    only(model)
    assert not (tmp_path / "was run").exists()


def test_the_model_is_opened_without_memory_for_its_weights(target, tmp_path, only):
    """A model of 70 billion parameters: its check reads a header and no tensor."""
    folder = shutil.copytree(target, tmp_path / "large")
    (folder / "model.safetensors").unlink()
    tiny.llama_config(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128,
    ).save_pretrained(folder)  # fmt: skip
    from draft_model.model_import.check import check_model

    assert check_model(folder, "large", [], weights=False).parameters == 70_553_706_496
