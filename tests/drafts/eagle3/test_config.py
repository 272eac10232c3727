"""The draft takes the target's geometry; what a user overrides fits or is refused, all of it at once."""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from draft_model.drafts.eagle3.config import DraftConfig, choose_aux_layers, draft_config_for, layers_of, with_overrides
from draft_model.errors import DraftModelError

from .families import FAMILIES, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, POSITIONS, ROPES, VOCAB, config_json

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"

LLAMA = {  # as the Hub has it: the style before transformers 5
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {**ROPES["llama3"], "original_max_position_embeddings": 8192},
}  # fmt: skip


@pytest.fixture
def default() -> DraftConfig:
    return draft_config_for(LLAMA)


def problems(default: DraftConfig, given: dict) -> list[str]:
    with pytest.raises(DraftModelError) as caught:
        with_overrides(default, given)
    return caught.value.problems


@pytest.mark.parametrize("family", FAMILIES)
def test_the_geometry_is_the_targets_and_config_json_says_it_to_engines_and_to_us(family, tmp_path):
    target = config_json(tmp_path, family)
    config = draft_config_for(target)
    explicit = FAMILIES[family][1]
    assert config.hidden_size == HIDDEN
    assert config.intermediate_size == INTERMEDIATE
    assert config.num_attention_heads == HEADS
    assert config.num_key_value_heads == KV_HEADS
    assert config.head_dim == explicit.get("head_dim", HIDDEN // HEADS)
    assert config.rms_norm_eps == explicit.get("rms_norm_eps", target["rms_norm_eps"])
    assert config.vocab_size == config.draft_vocab_size == VOCAB
    assert config.max_position_embeddings == POSITIONS
    assert config.aux_layers == (2, LAYERS // 2, LAYERS - 3)
    assert config.target_model_type == target["model_type"]
    assert explicit.get("rope_parameters", {}).items() <= config.rope_parameters.items()
    written = json.dumps(config.to_json())
    assert "null" not in written
    assert with_overrides(config, json.loads(written), "s3://ours") == config
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1,
        "tie_word_embeddings": False, "attention_bias": False, "vocab_size": VOCAB, "draft_vocab_size": VOCAB,
        "head_dim": config.head_dim, "max_position_embeddings": POSITIONS, LAYER_IDS: [2, 4, 5],
    }  # fmt: skip
    assert expected.items() <= config.to_json().items()
    assert config.to_json()["eagle_config"][LAYER_IDS] == [1, 3, 4]


def test_gemmas_full_attention_gives_the_rope(tmp_path):
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    config = draft_config_for(config_json(tmp_path, "gemma3_text", rope_parameters=ropes))
    assert config.rope_parameters == ropes["full_attention"]


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ROPES)
def test_rope_is_copied_in_the_hubs_older_styles(kind, key):
    rope = {key if name == "rope_type" else name: value for name, value in ROPES[kind].items()}
    config = draft_config_for({**LLAMA, "rope_theta": 123.0, "rope_scaling": rope})
    assert config.rope_parameters == {**ROPES[kind], "rope_theta": 123.0}


def test_rope_without_any_setting_is_llamas_first():
    target = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    for given in (target, {**target, "rope_scaling": None}):
        assert draft_config_for(given).rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}


def test_the_text_part_of_a_multimodal_target_counts():
    target = {"model_type": "gemma3", "vision_config": {"hidden_size": 7}, "text_config": LLAMA}
    assert draft_config_for(target) == draft_config_for(LLAMA)


def test_the_draft_vocabulary_is_32000_or_the_targets():
    assert draft_config_for(LLAMA).draft_vocab_size == 32_000
    assert draft_config_for({**LLAMA, "vocab_size": 1000}).draft_vocab_size == 1000


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(4, (1, 2, 3)), (5, (1, 2, 4)), (6, (1, 3, 5)), (7, (2, 3, 4)), (8, (2, 4, 5)), (36, (2, 18, 33))],
)
def test_features_come_after_layers_2_half_and_all_but_3_or_of_a_shallow_target_three_others(layers, expected):
    assert choose_aux_layers(layers) == expected


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_targets_that_are_too_shallow_are_refused(layers):
    with pytest.raises(DraftModelError, match=f"{layers} layers.*at least 4"):
        draft_config_for({**LLAMA, "num_hidden_layers": layers})


def test_a_target_of_another_structure_is_refused_by_what_it_lacks():
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
    with pytest.raises(DraftModelError, match=r"gpt2.*hidden_size.*num_hidden_layers"):
        draft_config_for(gpt2)


@pytest.mark.parametrize(
    "odd",
    [{"text_config": [1]}, {"num_attention_heads": 0}, {"num_key_value_heads": [8, 4]}, {"head_dim": "x"},
     {"vocab_size": True}, {"rope_parameters": -1},
     {"rope_parameters": {"rope_type": "longrope", "short_factor": 3}, "original_max_position_embeddings": 4}],
    ids=str,
)  # fmt: skip
def test_a_target_with_odd_settings_is_a_sentence(odd):
    with pytest.raises(DraftModelError, match="the target model"):
        draft_config_for({**LLAMA, **odd})


@pytest.mark.parametrize("kind", ROPES)
def test_rope_is_copied_in_todays_style_and_written_in_both(kind, tmp_path):
    from transformers import AutoConfig

    rope = {**ROPES[kind], "rope_theta": 123.0}
    assert draft_config_for(config_json(tmp_path, "qwen3", rope_parameters=rope)).rope_parameters == rope
    written = replace(draft_config_for(LLAMA), rope_parameters=rope).to_json()
    assert written["rope_parameters"] == rope
    assert written["rope_theta"] == 123.0
    if kind == "default":
        assert "rope_scaling" not in written
    else:
        assert written["rope_scaling"] == ROPES[kind]
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = AutoConfig.from_pretrained(tmp_path)
    assert rope.items() <= read.rope_parameters.items()
    assert (read.head_dim, read.num_key_value_heads, read.draft_vocab_size) == (128, 8, 32_000)


def test_a_partial_configuration_changes_what_it_names(default):
    given = {"draft_vocab_size": 8000, "intermediate_size": 1024, LAYER_IDS: [3, 10, 30]}
    expected = replace(default, draft_vocab_size=8000, intermediate_size=1024, aux_layers=(3, 10, 30))
    assert with_overrides(default, given) == expected
    assert with_overrides(default, {}) == default


def test_a_whole_configuration_of_another_trainer(default):
    given = {
        "architectures": ["LlamaForCausalLMEagle3"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 2048,
        "max_window_layers": 32, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 1, "num_key_value_heads": 8, "pad_token_id": None, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.28.1", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 128256, "draft_vocab_size": 32000,
    }  # fmt: skip
    theta = default.rope_parameters["rope_theta"]
    expected = {"rope_type": "default", "rope_theta": theta}
    assert with_overrides(default, given) == replace(default, max_position_embeddings=2048, rope_parameters=expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rope_theta": 7.0}, {**LLAMA["rope_scaling"], "rope_theta": 7.0}),
        ({"rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {**ROPES["linear"], "factor": 2.0, "rope_theta": 5e5}),
        ({"rope_scaling": ROPES["yarn"], "rope_theta": 7.0}, {**ROPES["yarn"], "rope_theta": 7.0}),
        ({"rope_parameters": ROPES["linear"]}, {**ROPES["linear"], "rope_theta": 5e5}),
        ({"rope_parameters": {**ROPES["linear"], "rope_theta": 7.0}}, {**ROPES["linear"], "rope_theta": 7.0}),
    ],
)
def test_rope_is_overridden_in_any_style(default, given, expected):
    assert with_overrides(default, given).rope_parameters == expected


def test_layers_may_stand_in_sglangs_place(default):
    nested = {"eagle_config": {"use_aux_hidden_state": True, LAYER_IDS: [1, 15, 28]}}
    assert with_overrides(default, nested).aux_layers == (2, 16, 29)
    assert with_overrides(default, {**nested, LAYER_IDS: [2, 16, 29]}).aux_layers == (2, 16, 29)
    gpt_oss = replace(default, target_model_type="gpt_oss")  # SpecForge's draft of gpt-oss-120b
    assert with_overrides(gpt_oss, {"eagle_config": {LAYER_IDS: [1, 17, 33]}}).aux_layers == (2, 18, 34)
    deepseek = replace(default, target_model_type="deepseek_v3")
    assert with_overrides(deepseek, {"eagle_config": {LAYER_IDS: [1, 29, 57]}}).aux_layers == (2, 30, 58)
    assert with_overrides(deepseek, {"eagle_config": {LAYER_IDS: [4, 30, 57]}}).aux_layers == (4, 30, 57)
    with pytest.raises(DraftModelError, match="SGLang cannot capture it from deepseek_v3"):
        with_overrides(deepseek, {LAYER_IDS: [1, 30, 57]})


def test_layers_are_those_of_the_training_where_an_earlier_version_wrote_others_for_sglang(default):
    gpt_oss = replace(default, target_model_type="gpt_oss")
    written = {**gpt_oss.to_json(), "eagle_config": {LAYER_IDS: [2, 16, 29]}}
    assert with_overrides(gpt_oss, written, "s3://old").aux_layers == (2, 16, 29)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({LAYER_IDS: [2, 16, 29]}, [2, 16, 29]),
        ({"eagle_config": {LAYER_IDS: [1, 15, 28]}}, [2, 16, 29]),
        ({"eagle_config": {LAYER_IDS: [4, 30, 57]}, "target_model_type": "deepseek_v3"}, [4, 30, 57]),
        ({"eagle_config": {LAYER_IDS: [2, 30, 58]}, "model_type": "kimi_k2"}, [2, 30, 58]),
        ({"eagle_config": {"use_aux_hidden_state": True}}, None),
        ({"eagle_config": None}, None),
    ],
)
def test_the_layers_of_any_trainers_configuration(config, expected):
    assert layers_of(config) == expected


SGLANG_FILES = {
    "llama": "llama.py", "mistral": "llama.py", "qwen2": "qwen2.py", "qwen3": "qwen3.py", "qwen3_moe": "qwen3_moe.py",
    "qwen3_next": "qwen3_next.py", "gpt_oss": "gpt_oss.py", "deepseek_v2": "deepseek_v2.py", "glm4_moe": "glm4_moe.py",
    "deepseek_v3": "deepseek_v2.py", "glm4_moe_lite": "glm4_moe_lite.py", "gemma3_text": "gemma3_causal.py",
    "bailing_moe": "bailing_moe.py", "minimax_m2": "minimax_m2.py", "apertus": "apertus.py",
    "deepseek_v32": "deepseek_v2.py", "glm_moe_dsa": "deepseek_v2.py", "kimi_k2": "deepseek_v2.py",
    "gemma4_text": "gemma4_causal.py", "exaone_moe": "exaone_moe.py", "longcat_flash": "longcat_flash.py",
}  # fmt: skip


def sglang_models() -> Any:
    """The folder of SGLang's model code: installed, or in the wheel that `make check-serving` downloads."""
    root = Path(__file__).parents[3]
    places: list[Any] = [Path(path) for path in sys.path if path]
    places += root.glob(".venv*/lib/python*/site-packages")
    places += map(zipfile.Path, root.glob(".venv-serving/wheels/sglang-*.whl"))
    for place in places:
        if (models := place / "sglang/srt/models").joinpath("llama.py").is_file():
            return models
    pytest.skip("sglang is not installed; `make check-serving` downloads its wheel")


def captured(models: Any, file: str, layers: int, ids: list[int]) -> list[int]:
    """After which layers SGLang's own method captures features: it is run on a stand-in for its model."""
    classes = [node for node in ast.parse((models / file).read_text()).body if isinstance(node, ast.ClassDef)]
    (method,) = [
        node
        for kind in classes
        if kind.name.endswith("ForCausalLM")
        for node in kind.body
        if isinstance(node, ast.FunctionDef) and node.name == "set_eagle3_layers_to_capture"
    ]
    for argument in method.args.args:
        argument.annotation = None
    here = SimpleNamespace(is_last_rank=True)
    space = {"get_parallel": lambda: SimpleNamespace(pp_group=here)}
    exec(compile(ast.Module([method], []), file, "exec"), space)
    model = SimpleNamespace()
    model.set_eagle3_layers_to_capture = lambda found: setattr(model, "layers_to_capture", found)
    config = SimpleNamespace(num_hidden_layers=layers)
    space["set_eagle3_layers_to_capture"](SimpleNamespace(pp_group=here, config=config, model=model), ids)
    return model.layers_to_capture


@pytest.mark.parametrize("family", SGLANG_FILES)
def test_sglang_captures_what_the_draft_was_trained_on(family):
    models = sglang_models()
    for layers, given in ((24, {}), (36, {}), (61, {}), (61, {LAYER_IDS: [4, 30, 57]}), (48, {LAYER_IDS: [2, 4, 6]})):
        target = {**LLAMA, "model_type": family, "num_hidden_layers": layers}
        draft = with_overrides(draft_config_for(target), given)
        ids = draft.to_json()["eagle_config"][LAYER_IDS]
        assert captured(models, SGLANG_FILES[family], layers, ids) == list(draft.aux_layers)


PHI4_MINI = {
    **LLAMA, "model_type": "phi3", "head_dim": 128, "partial_rotary_factor": 0.75, "rope_theta": 1e4,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0 + i / 47 for i in range(48)],
        "long_factor": [1.0 + i for i in range(48)],
    },
}  # fmt: skip


def test_factor_lists_over_a_part_of_the_head_become_lists_over_the_whole():
    rope = draft_config_for(PHI4_MINI).rope_parameters
    assert "partial_rotary_factor" not in rope
    assert rope["original_max_position_embeddings"] == 4096
    for name in ("short_factor", "long_factor"):
        given = PHI4_MINI["rope_scaling"][name]
        assert len(rope[name]) == 64
        assert (rope[name][0], rope[name][-1]) == (given[0], given[-1])
        assert rope[name] == sorted(rope[name])
    assert rope["long_factor"][32] == pytest.approx(1 + 32 * 47 / 63)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}, "default"),
        ({"rope_type": "default", "mrope_section": [11, 11, 10], "mrope_interleaved": True,
          "partial_rotary_factor": 0.25, "rope_theta": 1e6}, "default"),
        ({"type": "mrope", "mrope_section": [16, 24, 24], "rope_theta": 1e6}, "default"),
        ({"type": "su", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "rope_theta": 1e6}, "longrope"),
    ],
)  # fmt: skip
def test_engines_llama_layer_knows_the_drafts_rope_whatever_the_targets_is(rope, expected):
    for key in ("rope_parameters", "rope_scaling"):
        written = draft_config_for({**LLAMA, "rope_scaling": None, key: rope}).to_json()
        assert written["rope_parameters"].keys() <= {"rope_type", "rope_theta", "short_factor", "long_factor"}
        assert (written["rope_parameters"]["rope_type"], written["rope_theta"]) == (expected, 1e6)


@pytest.mark.parametrize("kind", [None, "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"])
def test_every_rope_type_of_transformers_gives_a_table(kind):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from draft_model.drafts.layers import rotary_table

    rope = {
        None: None, "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3, "factor": 4.0,
                     "original_max_position_embeddings": 64, "partial_rotary_factor": 0.75},
    }  # fmt: skip
    target = {**LLAMA, "head_dim": 8, "rope_scaling": rope[kind] if kind in rope else ROPES[kind]}
    table = rotary_table(draft_config_for(target), torch.device("cpu"), 16, torch.float32)
    assert table.shape == (2, 16, 8)
    assert set(ROPE_INIT_FUNCTIONS) == {"linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}


def test_an_unknown_rope_type_of_a_target_is_refused_by_name():
    with pytest.raises(DraftModelError, match=r"model_type 'llama'\): the rope_type 'spiral' is not known"):
        draft_config_for({**LLAMA, "rope_scaling": {"rope_type": "spiral"}})


OTHERS = {
    "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28, "model_type": "qwen2",
    "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "num_experts": 128,
    "architectures": ["Eagle3LlamaForCausalLM"], "layer_types": ["full_attention"], "partial_rotary_factor": 1.0,
}  # fmt: skip


def test_what_does_not_change_the_mathematics_is_ignored_with_a_note(default, caplog):
    caplog.set_level("INFO", "draft_model")
    assert with_overrides(default, OTHERS) == default
    assert "draft_model_config: ignored, for the draft is one Llama layer: model_type, sliding_window" in caplog.text
    assert with_overrides(default, OTHERS | {"torch_compile_flags": 3}, "s3://theirs") == default
    tied = {"tie_word_embeddings": True, "model_type": "phi3"}  # SpecForge's for Phi-4-mini
    assert with_overrides(default, tied | {"draft_vocab_size": 16000}).draft_vocab_size == 16000
    assert "one Llama layer: model_type, tie_word_embeddings" in caplog.text
    with pytest.raises(DraftModelError, match=r"s3://theirs: `use_sliding_window` is True; allowed: False"):
        with_overrides(default, OTHERS | {"use_sliding_window": True}, "s3://theirs")


MISFITS = [
    ({"hidden_size": 2048}, "hidden_size", "4096"),
    ({"target_hidden_size": 2048}, "target_hidden_size", "4096"),
    ({"vocab_size": 32000}, "vocab_size", "128256"),
    ({"draft_vocab_size": 128257}, "draft_vocab_size", "128256"),
    ({"draft_vocab_size": 0}, "draft_vocab_size", ">= 1"),
    ({"intermediate_size": "big"}, "intermediate_size", "'big'"),
    ({"head_dim": 12.5}, "head_dim", "12.5"),
    ({"head_dim": 15}, "head_dim", "even"),
    ({"max_position_embeddings": -1}, "max_position_embeddings", ">= 1"),
    ({"num_key_value_heads": 5}, "num_attention_heads", "multiple"),
    ({"num_attention_heads": 24}, "num_attention_heads", "4096"),
    ({"num_attention_heads": True}, "num_attention_heads", "whole number"),
    ({"rms_norm_eps": 0}, "rms_norm_eps", "> 0"),
    ({"intermediate_size": 10**9}, "intermediate_size", "at most 65536"),
    ({"head_dim": 10**9}, "head_dim", "at most 65536"),
    ({"num_hidden_layers": 2}, "num_hidden_layers", "allowed: 1"),
    ({"tie_word_embeddings": True, "draft_vocab_size": 128256}, "tie_word_embeddings", "False"),
    ({"attention_bias": True}, "attention_bias", "False"),
    ({"hidden_act": "gelu"}, "hidden_act", "silu"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures", "LlamaForCausalLMEagle3"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "allowed: 1"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters", "whole heads"),
    ({"layer_types": ["sliding_attention"]}, "layer_types", "full_attention"),
    ({"logit_scale": 0.1}, "logit_scale", "allowed: 1"),
    ({"rope_scaling": "linear"}, "rope_scaling", "object"),
    ({"rope_parameters": {"rope_type": "spiral"}}, "rope_parameters", "llama3, yarn"),
    ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}, "rope_theta", "give one"),
    ({LAYER_IDS: [2, 2, 5]}, LAYER_IDS, "ascending"),
    ({LAYER_IDS: []}, LAYER_IDS, "three or five"),
    ({"fc_norm": 1}, "fc_norm", "true, false"),
    ({"num_aux_hidden_states": 5}, "num_aux_hidden_states", "there are 3"),
    ({LAYER_IDS: ["a", 1, 2]}, LAYER_IDS, "'a'"),
    ({LAYER_IDS: 5}, LAYER_IDS, "three"),
    ({LAYER_IDS: [0, 1, 2]}, LAYER_IDS, "lowest is 1"),
    ({LAYER_IDS: [2, 16, 29], "eagle_config": {LAYER_IDS: [2, 16, 29]}}, LAYER_IDS, "give one"),
    ({"use_sliding_window": True}, "use_sliding_window", "allowed: False"),
    ({"norm_before_residual": True}, "norm_before_residual", "not a setting"),
    ({"hidden_siez": 4096}, "hidden_siez", "not a setting"),
]


@pytest.mark.parametrize(("given", "name", "hint"), MISFITS)
def test_a_misfit_is_refused_by_name(default, given, name, hint):
    (problem,) = problems(default, given)
    assert problem.startswith("draft_model_config: ")
    assert f"`{name}`" in problem
    assert hint in problem


def test_all_misfits_are_told_at_once(default):
    given = {
        "hidden_size": 1, "vocab_size": 2, "num_hidden_layers": 3, "draft_vocab_size": -4, "rms_norm_eps": "small",
        "rope_scaling": 5, LAYER_IDS: [6, 5], "what": 7,
    }  # fmt: skip
    found = problems(default, given)
    assert len(found) == len(given)
    for key in given:
        assert sum(f"`{key}`" in problem for problem in found) == 1
