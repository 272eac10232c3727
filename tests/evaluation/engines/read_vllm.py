"""What vLLM's own configuration code makes of drafts: `make check-serving` sets up the Python that runs this.

Usage: python read_vllm.py TARGET VLLM_EXPORT SPECULATORS_EXPORT
"""

import json
import sys

from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.transformers_utils.config import maybe_override_with_speculators
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config


def read(target, draft):
    """As `vllm serve TARGET --speculative-config ...` does before it loads weights."""
    read = SpeculativeConfig(
        method="eagle3", model=draft, num_speculative_tokens=3, target_parallel_config=ParallelConfig(),
        target_model_config=ModelConfig(model=target, dtype="float32", max_model_len=64),
    )  # fmt: skip
    config = read.draft_model_config.hf_config
    return {
        "architectures": read.draft_model_config.architectures, "layers": get_eagle3_aux_layers_from_config(read),
        "draft": config.draft_vocab_size, "vocabulary": config.vocab_size, "hidden": config.hidden_size,
        "heads": config.num_attention_heads, "head_dim": config.head_dim, "context": config.max_position_embeddings,
        "rope": config.rope_parameters["rope_theta"],
    }  # fmt: skip


target, *drafts = sys.argv[1:]
# What `vllm serve SPECULATORS_EXPORT` serves.
served, _, speculative = maybe_override_with_speculators(drafts[1], None, False)
print(json.dumps({"drafts": [read(target, draft) for draft in drafts], "served": [served, speculative]}))
