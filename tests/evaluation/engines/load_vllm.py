"""Loads a DSpark draft by vLLM's own model class, which vLLM for CPU has and does not run.

Usage: python load_vllm.py TARGET DRAFT PROPOSALS SCRATCH_FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.qwen3_dspark import Qwen3DSparkForCausalLM

target, draft, proposals, scratch = sys.argv[1:]
VllmConfig._get_v1_model_runner_unsupported_features = lambda _: []  # which names DSpark
speculative = {"method": "dspark", "model": draft, "num_speculative_tokens": int(proposals)}
config = EngineArgs(
    target, dtype="float32", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True,
    speculative_config=speculative,
).create_engine_config()  # fmt: skip
with set_current_vllm_config(config), torch.no_grad():
    init_distributed_environment(1, 0, f"file://{scratch}/rendezvous", 0, "gloo")
    initialize_model_parallel(1, 1)
    model = Qwen3DSparkForCausalLM(vllm_config=config)
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.is_floating_point()]
    for _, weight in weights:
        weight.fill_(torch.nan)
    model.load_weights(load_file(Path(draft) / "model.safetensors").items())
    found = config.speculative_config.draft_model_config.hf_config
    print(json.dumps({
        "not loaded": sorted(name for name, weight in weights if weight.isnan().any()),
        "confidence": model.model.confidence_head is not None, "rank": found.markov_rank, "block": found.block_size,
        "features": model.model.fc.weight.shape[1] // found.hidden_size,
    }))  # fmt: skip
