"""Loads a draft by SpecForge's own model code and saves it again: `make bench-peers` sets up the Python for it.

Usage: python specforge_round_trip.py DRAFT SAVED
"""

import json
import sys
from pathlib import Path


def main(draft, saved):
    import torch._inductor.compile_fx  # noqa: F401 - before the stand-in, which must not pass for the real triton

    sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks/steps"))
    from step_specforge import _stand_in_for_triton

    _stand_in_for_triton()
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3

    model, said = LlamaForCausalLMEagle3.from_pretrained(draft, output_loading_info=True)
    model.save_pretrained(saved)
    print(json.dumps({"missing": sorted(said["missing_keys"]), "unexpected": sorted(said["unexpected_keys"])}))


main(*sys.argv[1:])
