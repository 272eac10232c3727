"""Serves the demo's target in vLLM, alone and with the demo's draft, and holds vLLM's counters against our estimate.

It runs in a virtual environment of its own (`make check-serving`), on the prompts that the evaluation decoded:
vLLM's output must be the same with and without the draft, and its acceptance length within 0.05 of ours.

Usage: python check_serving.py RUN_FOLDER TARGET_FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOLERANCE = 0.05
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": str(os.cpu_count() or 1),
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def serve(target: str, draft: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Decodes the evaluation's prompts greedily in one vLLM engine.

    Args:
        target: folder of the target.
        draft: folder of the draft; empty for the target alone.
        evaluation: evaluation.json.

    Returns:
        Output tokens of each prompt, and vLLM's counters of drafts and accepted tokens.
    """
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    proposals = evaluation["num_speculative_tokens"]
    speculative = {"method": "eagle3", "model": draft, "num_speculative_tokens": proposals} if draft else None
    engine = LLM(
        model=target, speculative_config=speculative, dtype="float32", enforce_eager=True, max_model_len=1024,
        disable_log_stats=False, enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=evaluation["max_new_tokens"])
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in evaluation["prompt_tokens"]]
    outputs = engine.generate(prompts, sampling)
    counters = {metric.name: metric for metric in engine.get_metrics()}
    found: dict[str, Any] = {"outputs": [list(output.outputs[0].token_ids) for output in outputs]}
    if draft:
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
            found[name] = counters[f"vllm:spec_decode_{name}"].value
        found["per_position"] = list(counters["vllm:spec_decode_num_accepted_tokens_per_pos"].values)
    return found


def in_own_process(target: Path, draft: str, evaluation: Path) -> dict[str, Any]:
    """Runs `serve` in a fresh process, so that the two engines share nothing."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--serve", str(target), draft, str(evaluation), str(result)]
        subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True)
        return json.loads(result.read_text(encoding="utf-8"))


def first_difference(left: list[int], right: list[int]) -> int | None:
    """Where two token lists first differ; None where they are equal."""
    if left == right:
        return None
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def main(run: Path, target: Path) -> int:
    """Prints the comparison; 0 where vLLM agrees."""
    draft = run / "output" / "final"
    path = draft / "evaluation.json"
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    alone = in_own_process(target, "", path)
    helped = in_own_process(target, str(draft), path)
    length = 1 + helped["num_accepted_tokens"] / helped["num_drafts"]
    ours = evaluation["trained"]
    places = [first_difference(a, b) for a, b in zip(alone["outputs"], helped["outputs"], strict=True)]
    different = [(number, place) for number, place in enumerate(places) if place is not None]
    tokens = sum(len(output) for output in alone["outputs"])
    shares = ", ".join(f"{count / helped['num_drafts']:.3f}" for count in helped["per_position"])
    print(f"\n{len(alone['outputs'])} prompts, {tokens} tokens, greedy, float32")
    print(
        f"outputs with and without the draft: {'equal' if not different else f'different (prompt, token): {different}'}"
    )
    print(f"{'':24}{'vLLM':>28}{'our evaluation':>28}")
    print(f"{'drafts':24}{helped['num_drafts']:>28.0f}{ours['rounds']:>28}")
    print(f"{'accepted tokens':24}{helped['num_accepted_tokens']:>28.0f}{ours['accepted']:>28}")
    ours_shares = ", ".join(f"{share:.3f}" for share in ours["acceptance_by_position"])
    print(f"{'accepted by position':24}{shares:>28}{ours_shares:>28}")
    print(f"{'acceptance length':24}{length:>28.3f}{ours['acceptance_length']:>28.3f}")
    close = abs(length - ours["acceptance_length"]) <= TOLERANCE
    print("vLLM agrees" if close and not different else "vLLM does NOT agree")
    return 0 if close and not different else 1


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        found = serve(sys.argv[2], sys.argv[3], json.loads(Path(sys.argv[4]).read_text(encoding="utf-8")))
        Path(sys.argv[5]).write_text(json.dumps(found), encoding="utf-8")
    else:
        sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
