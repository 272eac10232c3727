"""vLLM measures a job: `python -m draft_model.engine.vllm job.json measured.json`."""

from __future__ import annotations

import os
from typing import Any

from draft_model.engine import Counts, Job, Measured, serve, time_batches

_CPU = {  # without these vLLM binds all threads to one core and reserves half of the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
}


def run(job: Job) -> Measured:
    """Decodes the prompts, category by category, because vLLM's counters are sums over requests."""
    for name, value in {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **_CPU}.items():
        os.environ.setdefault(name, value)
    import torch
    import vllm  # type: ignore[import-not-found]
    from vllm import LLM, SamplingParams

    gpus = torch.cuda.device_count()
    engine: Any = LLM(**arguments(job, gpus))

    def generate(prompts: list[list[int]], temperature: float = 0.0, logprobs: int | None = None) -> list[Any]:
        sampling = SamplingParams(
            temperature=temperature, max_tokens=job.max_new_tokens, stop_token_ids=job.end_tokens,
            seed=job.seed if temperature else None, logprobs=logprobs, detokenize=False,
        )  # fmt: skip
        requests: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [output.outputs[0] for output in engine.generate(requests, sampling, use_tqdm=False)]

    def counted(temperature: float, prompts: list[list[int]], logprobs: int | None = None) -> tuple[list[Any], Counts]:
        before = _counts(engine, job.proposals)
        outputs = generate(prompts, temperature, logprobs)
        return outputs, _counts(engine, job.proposals).plus(before, -1)

    greedy = [counted(0.0, group, None if job.draft else 2) for group in job.groups]
    everything = [prompt for group in job.groups for prompt in group]
    return Measured(
        engine=f"vLLM {vllm.__version__}",
        hardware=f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else f"CPU, {torch.get_num_threads()} threads",
        dtype=str(engine.llm_engine.vllm_config.model_config.dtype).removeprefix("torch."),
        outputs=[[list(output.token_ids) for output in outputs] for outputs, _ in greedy],
        margins=[] if job.draft else [[_margins(output.logprobs) for output in outputs] for outputs, _ in greedy],
        counts=[counts for _, counts in greedy] if job.draft else [],
        sampled=counted(job.temperature, everything)[1] if job.draft and job.temperature else None,
        speed=time_batches(job, gpus > 0, lambda batch: sum(len(output.token_ids) for output in generate(batch))),
    )


def arguments(job: Job, gpus: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; nothing but the target's own settings decides what it decodes."""
    longest = max(len(prompt) for group in job.groups for prompt in group)
    speculative = {"method": job.method, "model": job.draft, "num_speculative_tokens": job.proposals}
    return {
        "model": job.target,
        "speculative_config": speculative if job.draft else None,
        "dtype": "auto" if gpus else "float32",
        "tensor_parallel_size": max(1, gpus),
        "max_model_len": longest + job.max_new_tokens + 2 * (job.proposals + 1),
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "enforce_eager": not gpus,
        "enable_prefix_caching": False,
        "disable_log_stats": False,  # the counters
        "trust_remote_code": False,
        "seed": job.seed,
    }


def _counts(engine: Any, proposals: int) -> Counts:
    metrics = {metric.name.removeprefix("vllm:spec_decode_"): metric for metric in engine.get_metrics()}
    if "num_drafts" not in metrics:
        return Counts(0, 0, 0, [0] * proposals)
    rounds, drafted, accepted = (
        int(metrics[name].value) for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    return Counts(rounds, drafted, accepted, [int(n) for n in metrics["num_accepted_tokens_per_pos"].values])


def _margins(logprobs: list[dict[int, Any]]) -> list[float]:
    """Distance of the two best logprobs at each token."""
    best = [sorted((found.logprob for found in position.values()), reverse=True) for position in logprobs]
    return [values[0] - values[1] for values in best]


if __name__ == "__main__":
    serve(run)
