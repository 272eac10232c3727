"""Measures the demo's draft in vLLM by the evaluation's own code and holds vLLM's counters against our decoder's.

`make check-serving` runs it on the prompts that the demo's evaluation decoded; the replies must be the same with and
without the draft, and the counts those of evaluation.json, which our own decoder wrote.

Usage: python check_serving.py RUN_FOLDER TARGET_FOLDER, with vLLM's Python in DRAFT_MODEL_ENGINE_PYTHON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from draft_model import engine
from draft_model.dataset.encode import load_tokenizer
from draft_model.engine import Job
from draft_model.evaluation.measure import differences, end_tokens

TOLERANCE = 0.05


def main(run: Path, target: Path) -> int:
    """Prints the comparison; 0 where vLLM agrees."""
    draft = run / "output/final"
    ours = json.loads((draft / "evaluation.json").read_text(encoding="utf-8"))
    template = json.loads((draft / "report.json").read_text(encoding="utf-8"))["dataset"]["chat_template"]
    found = []
    with tempfile.TemporaryDirectory() as work:
        for folder in ("", str(draft)):
            job = Job(
                target=str(target),
                draft=folder,
                method="eagle3",
                proposals=ours["num_speculative_tokens"],
                groups=[ours["prompt_tokens"]],
                max_new_tokens=ours["max_new_tokens"],
                end_tokens=end_tokens(target, load_tokenizer(target), template),
                temperature=0.0,
                seed=0,
                batch_sizes=[1, 4],
            )
            found.append(engine.measure("vllm", job, Path(work)))
    alone, helped = found
    compared, different = differences(alone, helped)
    theirs = helped.total.report()
    prompts = len(ours["prompt_tokens"])
    print(f"\n{prompts} prompts, {compared} tokens compared, greedy, {helped.dtype}, {helped.engine}")
    print(f"{'':24}{'vLLM':>28}{ours['engine']:>28}")
    for name in ("rounds", "accepted", "acceptance_length", "acceptance_by_position"):
        left, right = (
            ", ".join(f"{value:.3f}" for value in values[name])
            if isinstance(values[name], list)
            else f"{values[name]:.5g}"
            for values in (theirs, ours["trained"])
        )
        print(f"{name:24}{left:>28}{right:>28}")
    for size, speed in helped.speed.items():
        print(f"tokens/s at {size:<12}{speed:>28.1f}{alone.speed[size]:>28.1f} alone")
    agrees = abs(theirs["acceptance_length"] - ours["trained"]["acceptance_length"]) <= TOLERANCE
    lossless = all(difference.tie for difference in different)
    print(f"{len(different)} replies differ, {'ties all of them' if lossless else f'not by a tie: {different}'}")
    print("vLLM agrees" if agrees and lossless else "vLLM does NOT agree")
    return 0 if agrees and lossless else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
