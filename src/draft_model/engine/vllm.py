"""vLLM as an engine's process: `python -m draft_model.engine.vllm`."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from draft_model.engine import Counts, Engine, Job, serve


class Vllm(Engine):
    """vLLM with one job's target; decodes category by category, because its counters are sums over requests."""

    def __init__(self, job: Job) -> None:
        set_variables(job.gpus)
        from vllm import LLM  # type: ignore[import-not-found]

        self.job, self.engine = job, LLM(**arguments(job))

    def describe(self) -> tuple[str, str, str]:
        """As of every engine."""
        import torch
        import vllm

        gpus = self.job.gpus
        hardware = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else cpu(torch.get_num_threads())
        dtype = str(self.engine.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")
        return f"vLLM {vllm.__version__}", hardware, dtype

    def decode(
        self, prompts: list[list[int]], temperature: float = 0.0, margins: bool = False
    ) -> tuple[list[list[int]], list[list[float]], Counts]:
        """As of every engine."""
        from vllm import SamplingParams

        job = self.job
        sampling = SamplingParams(
            temperature=temperature, max_tokens=job.max_new_tokens, stop_token_ids=job.end_tokens,
            seed=job.seed if temperature else None, logprobs=2 if margins else None, detokenize=False,
        )  # fmt: skip
        requests: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        before = _counts(self.engine, job.proposals)
        outputs = [output.outputs[0] for output in self.engine.generate(requests, sampling, use_tqdm=False)]
        apart = [_margins(output.logprobs) for output in outputs] if margins else []
        counts = _counts(self.engine, job.proposals).plus(before, -1)
        return [list(output.token_ids) for output in outputs], apart, counts


def set_variables(gpus: int) -> None:
    """Sets vLLM's environment variables, but those that the user has set; before it is imported."""
    on_cpu = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all threads share one core
        "VLLM_CPU_KVCACHE_SPACE": "1",  # else half of the memory
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else scheduler and worker import vLLM once more each
        "TORCH_COMPILE_DISABLE": "1",  # else helpers are compiled in each process, by a compiler that a pod lacks
    }
    for name, value in {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **({} if gpus else on_cpu)}.items():
        os.environ.setdefault(name, value)


def cpu(threads: int) -> str:
    """A CPU's model and threads."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({(names or [platform.machine()])[0]}, {threads} threads)"


def arguments(job: Job) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; nothing but the target's own settings decides what it decodes."""
    speculative = {"method": job.method, "model": job.draft, **job.options}
    return {
        "model": job.target,
        "speculative_config": speculative if job.draft else None,
        "dtype": "auto" if job.gpus else "float32",
        "tensor_parallel_size": max(1, job.gpus),
        "max_model_len": max(map(len, job.prompts)) + job.max_new_tokens + 2 * (job.proposals + 1),
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "enforce_eager": not job.gpus,
        "enable_prefix_caching": False,
        "disable_log_stats": False,  # the counters
        "trust_remote_code": False,
        "seed": job.seed,
        **({"gpu_memory_utilization": job.memory_share} if job.gpus else {}),
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
    serve(Vllm)
