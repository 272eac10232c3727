"""Which models can be targets is decided by their structure: each family as a tiny random model of transformers'."""

import gc
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from draft_model.entrypoint import GC_THRESHOLD
from draft_model.model_import.check import inspect

from .case import change_config

SHAPE = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
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
STRUCTURE, RECURRENT = "Llama's structure", "recurrent state"
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4
}  # fmt: skip
REFUSED = {
    "GPT2Config": (STRUCTURE, {"n_layer": 6, "n_head": 4, "n_embd": 32, "num_key_value_heads": None}),
    "BloomConfig": (STRUCTURE, {"n_layer": 6, "n_head": 4}),
    "GPTNeoXConfig": (STRUCTURE, {}),
    "MambaConfig": (STRUCTURE, {}),
    "Qwen3NextConfig": (RECURRENT, {**EXPERTS, **LINEAR, "num_experts": 4, "head_dim": 8,
                                    "shared_expert_intermediate_size": 16}),
    "GraniteMoeHybridConfig": (RECURRENT, {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16, "mamba_n_heads": 4,
        "mamba_d_head": 16, "layer_types": ["mamba", "attention"] * 3}),
    "MiniMaxConfig": (RECURRENT, {"num_local_experts": 4, "head_dim": 8}),
    "Qwen3_5TextConfig": (RECURRENT, {**LINEAR, "head_dim": 8}),
    "OlmoHybridConfig": (RECURRENT, LINEAR),
    "Lfm2Config": (RECURRENT, {"layer_types": ["conv", "full_attention"] * 3}),
}  # fmt: skip
QUANTISED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def save(folder, name, **changes):
    """Replaces a folder's model by a random one of another family."""
    import transformers

    torch.manual_seed(0)
    settings = {key: value for key, value in {**SHAPE, **changes}.items() if value is not None}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return model


def facts(folder):
    """What the check finds in this process; the other tests have it in its limited one."""
    return inspect(folder, [path.name for path in folder.glob("*.safetensors")])


def problem(folder):
    (found,) = facts(folder)["problems"]
    return found


def tensors(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, change):
    save_file(change(tensors(folder)), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_family_of_the_structure_is_taken_and_counted_exactly(model, name):
    saved = save(model, name, **SUPPORTED[name])
    found = facts(model)
    assert found["problems"] == []
    assert found["architecture"] == type(saved).__name__
    assert found["parameter_count"] == sum(weight.numel() for weight in set(saved.parameters()))
    assert found["max_positions"] == 256


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_another_structure_or_with_a_recurrent_state_is_refused(model, name):
    said, settings = REFUSED[name]
    save(model, name, **settings)
    assert said in problem(model)


@pytest.mark.parametrize(("kind", "said"), [("BertConfig", "(bert) is no decoder-only model"), ("T5Config", "'t5'")])
def test_encoders_are_refused(model, kind, said):
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 48}
    config = getattr(transformers, kind)(**shape)
    config.save_pretrained(model)
    assert said in problem(model)


def test_logits_that_the_training_does_not_know_are_refused(model, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def squared(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = outputs.logits**2
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", squared)
    assert "its logits are no plain function of its head" in problem(model)


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen3MoeConfig", "GptOssConfig", "Gemma2Config"])
@pytest.mark.parametrize("which", [0, 7, -1])
def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_the_tensor_named(model, name, which):
    save(model, name, **SUPPORTED[name])
    lost = sorted(tensors(model))[which]
    rewrite(model, lambda found: {key: value for key, value in found.items() if key != lost})
    said = problem(model)
    assert "its weights lack " in said
    assert lost in said


def test_a_tied_head_is_not_missing(model):
    saved = save(model, "Qwen2Config", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors(model)
    assert facts(model)["parameter_count"] == saved.num_parameters()


def test_checkpoints_that_contradict_their_configuration(model):
    change_config(model, intermediate_size=64)
    assert "model.layers.0.mlp.down_proj.weight [32, 48], where config.json asks for [32, 64]" in problem(model)
    change_config(model, intermediate_size=48, num_hidden_layers=8)
    assert "model.layers.6.input_layernorm.weight" in problem(model)
    assert " and 13 more" in problem(model)


def fp8(found):
    made = {}
    for name, weight in found.items():
        made[name] = weight.to(torch.bfloat16)
        if name.endswith("_proj.weight"):
            scale = weight.abs().max() / 448
            made[name] = (weight / scale).to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = torch.full((1, 1), float(scale))
    return made


def mxfp4(found):
    made = {}
    for name, weight in found.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = weight.shape
            made[f"{name}_blocks"] = torch.zeros(experts, outputs, inputs // 32, 16, dtype=torch.uint8)
            made[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 120, dtype=torch.uint8)
        else:
            made[name] = weight
    return made


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_quantised_weights_that_transformers_can_run_are_taken_as_they_are(model, method):
    from draft_model.target.model import load_model

    if method == "fp8":
        save(model, "LlamaConfig")
        settings = QUANTISED
    else:
        save(model, "GptOssConfig", **{**SUPPORTED["GptOssConfig"], "hidden_size": 64, "intermediate_size": 64})
        kept = ["lm_head", "model.embed_tokens", "model.layers.*.mlp.router", "model.layers.*.self_attn"]
        settings = {"quant_method": method, "modules_to_not_convert": kept}
    before = tensors(model)
    rewrite(model, {"fp8": fp8, "mxfp4": mxfp4}[method])
    change_config(model, quantization_config=settings)
    found = facts(model)
    assert found["problems"] == []
    assert found["quantization"] == method
    gc.set_threshold(51_000)
    target = load_model(model, torch.float32)
    assert gc.get_threshold() == GC_THRESHOLD
    loaded = target.state_dict()
    assert method == "mxfp4" or {weight.dtype for weight in loaded.values()} == {torch.float32}
    target(input_ids=torch.ones(1, 3, dtype=torch.long))
    if method == "fp8":
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.allclose(loaded[name], before[name], atol=0.1 * float(before[name].abs().max()))
    rewrite(model, lambda found: {key: value for key, value in found.items() if "layers.2." not in key})
    assert "its weights lack model.layers.2." in problem(model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        *(({"quant_method": method}, method)
          for method in ("awq", "gptq", "compressed-tensors", "bitsandbytes", "modelopt", "no such")),
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes"),  # before it named itself
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_other_quantisations_are_refused_by_name(model, settings, said, nested):
    settings = {"quantization_config": settings}
    config = json.loads((model / "config.json").read_text())
    change_config(model, **{"text_config": config | settings} if nested else settings)
    assert f"it is quantised by '{said}'" in problem(model)


def gptq(found):
    weights = [name for name in found if name.endswith("_proj.weight")]
    packed = {name.replace(".weight", ".qweight"): torch.zeros(4, 4, dtype=torch.int32) for name in weights}
    return {name: weight for name, weight in found.items() if name not in weights} | packed


@pytest.mark.parametrize("pack", [fp8, gptq])
def test_quantised_weights_of_which_the_configuration_says_nothing_are_refused(model, pack):
    """Their own file (hf_quant_config.json, quantize_config.json) is none that transformers reads."""
    rewrite(model, pack)
    assert "are quantised, but config.json has no quantization_config" in problem(model)


ROPE = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("rope", "works"),
    [
        ({"rope_type": "linear"}, True),
        ({"rope_type": "dynamic"}, True),
        ({"rope_type": "yarn"}, True),
        ({"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}, True),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, True),
        ({"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}, False),
        ({"rope_type": "proportional"}, True),
        ({"rope_type": "mine"}, False),
    ],
)
def test_a_rotary_embedding_works_in_the_draft_or_is_refused(model, rope, works):
    change_config(model, rope_parameters={**ROPE, **rope})
    found = facts(model)["problems"]
    assert (found == []) == works
    assert works or any(
        text in found[0] for text in ("rope_type 'mine'", "its rotary embedding", "that transformers loads")
    )


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "mine"}, {"num_attention_heads": 0}, {"hidden_size": "many"}, {"hidden_act": "mine"},
     {"num_hidden_layers": 3}],
)  # fmt: skip
def test_a_config_that_cannot_be_used(model, changes):
    change_config(model, **changes)
    assert problem(model)


NO_JSON = [b"{", b"[1]", b"\xff\xfe{}", b"", b"[" * 100_000]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        *((name, content, f"its {name} cannot be read: ")
          for name in ("config.json", "tokenizer_config.json", "generation_config.json") for content in NO_JSON),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', "has the eos_token_id '</s>'"),
        *(("model.safetensors", content, "model.safetensors is damaged or cut short: ")
          for content in (0, 4, 1000, -1, b"version https://git-lfs.github.com/spec/v1\n")),
        *(("tokenizer.json", content, "its tokenizer cannot be loaded")
          for content in (b"{", b"{}", b'{"model": {"type": "BPE"}}')),
        ("tokenizer.json", None, "it has no tokenizer (tokenizer.json,"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(model, name, content, said):
    path = model / name
    data = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(data[:content] if isinstance(content, int) else content)
    assert said in problem(model)


def test_the_model_is_opened_without_memory_for_its_weights(model):
    """A model of 70 billion parameters: its check reads a header and no tensor."""
    (model / "model.safetensors").unlink()
    tiny.llama_config(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128,
    ).save_pretrained(model)  # fmt: skip
    assert inspect(model, [])["parameter_count"] == 70_553_706_496
