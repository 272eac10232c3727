"""A target in FP8, as production ones are: imported, trained on and evaluated, in each type that computes on a CPU."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from draft_model import evaluation, storage
from draft_model.parameters import Parameters
from training.case import import_model

QUANTISED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tests' target in block FP8, as Qwen's and DeepSeek's are."""
    folder = tmp_path_factory.mktemp("fp8")
    source = tiny.write_target(folder / "source")
    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = weight.abs().max() / 448
            weights[name] = (weight / scale).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = torch.full((1, 1), float(scale))
        else:
            weights[name] = weight.to(torch.bfloat16)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTISED, "dtype": "bfloat16"}))
    model = import_model(folder, source)
    assert storage.read_manifest(model).properties["quantization"] == "fp8"
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_fp8_target_is_trained_on_and_evaluated(train, inputs, model, tmp_path, dtype):
    trained = train(model=model, num_epochs=8, compute_dtype=dtype)
    losses = list(trained.losses.values())
    assert losses[-1][0] < losses[0][0]
    p = Parameters(evaluation_conversations=2, evaluation_max_new_tokens=8, num_speculative_tokens=2)
    final = f"{trained.output}/final"
    result = evaluation.run(evaluation.EvaluateConfig(model, inputs.dataset, final, tmp_path / "evaluation", p))
    assert result.metrics["compared_tokens"] > 0
