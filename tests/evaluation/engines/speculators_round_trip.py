"""Loads an export by speculators' own model code and saves it again: `make bench-peers` sets up the Python for it.

Usage: python speculators_round_trip.py EXPORT SAVED
"""

import json
import sys

from speculators import SpeculatorModel, SpeculatorModelConfig

export, saved = sys.argv[1:]
read = SpeculatorModelConfig.from_pretrained(export)
layer, verifier = read.transformer_layer_config, read.speculators_config.verifier
model = SpeculatorModel.from_pretrained(export)
model.save_pretrained(saved)
print(json.dumps({
    "class": type(read).__name__, "layers": getattr(read, "eagle_aux_hidden_state_layer_ids", None),
    "draft": read.draft_vocab_size, "hidden": layer.hidden_size,
    "heads": layer.num_attention_heads, "head_dim": layer.head_dim,
    "vocabulary": layer.vocab_size, "verifier": verifier.name_or_path, "rope": layer.rope_parameters["rope_theta"],
    "norms": [getattr(read, f"norm_{name}", None) for name in ("before_residual", "before_fc", "output")],
    "fc_norm": getattr(read, "fc_norm", None),
    "model": type(model).__name__,
}))  # fmt: skip
