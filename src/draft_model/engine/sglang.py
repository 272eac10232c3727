"""SGLang as an engine's process: `python -m draft_model.engine.sglang`. It needs a GPU."""

from __future__ import annotations

import time
from typing import Any

from draft_model.engine import Counts, Job, Measured, serve

HISTOGRAM = "spec_correct_drafts_histogram"
"""In a request's meta_info: in how many rounds 0, 1, ... proposals were kept."""


class Sglang:
    """SGLang with one job's target."""

    def __init__(self, job: Job) -> None:
        import sglang  # type: ignore[import-not-found]

        self.job, self.engine = job, sglang.Engine(**arguments(job))

    def measure(self) -> Measured:
        """Greedy decoding of all prompts, and sampling where the job has a temperature."""
        import sglang
        import torch

        job = self.job
        greedy = [self._generate(group, logprobs=not job.draft) for group in job.groups]
        sampled = self._generate(job.prompts, job.temperature) if job.draft and job.temperature else []
        return Measured(
            engine=f"SGLang {sglang.__version__}",
            hardware=f"{job.gpus} x {torch.cuda.get_device_name(0)}",
            dtype=str(self.engine.server_args.dtype).replace("auto", "bfloat16"),
            outputs=[[list(output["output_ids"]) for output in group] for group in greedy],
            margins=[] if job.draft else [[_margins(output["meta_info"]) for output in group] for group in greedy],
            counts=[counts(group, job.proposals) for group in greedy] if job.draft else [],
            sampled=counts(sampled, job.proposals) if sampled else None,
        )

    def time(self, size: int, number: int) -> float:
        """Tokens per second of the n-th batch of a size."""
        started = time.perf_counter()
        outputs = self._generate(self.job.batch(size, number))
        return sum(len(output["output_ids"]) for output in outputs) / (time.perf_counter() - started)

    def _generate(
        self, prompts: list[list[int]], temperature: float = 0.0, logprobs: bool = False
    ) -> list[dict[str, Any]]:
        more = {"return_logprob": True, "top_logprobs_num": 2} if logprobs else {}
        outputs: list[dict[str, Any]] = self.engine.generate(
            input_ids=prompts, sampling_params=sampling(self.job, temperature), **more
        )
        return outputs


def sampling(job: Job, temperature: float) -> dict[str, Any]:
    """Parameters of a request."""
    return {"temperature": temperature, "max_new_tokens": job.max_new_tokens, "stop_token_ids": job.end_tokens}


def arguments(job: Job) -> dict[str, Any]:
    """Arguments of `sglang.Engine` (0.5.23)."""
    draft = {"speculative_algorithm": job.method, "speculative_draft_model_path": job.draft, **job.options}
    return {
        "model_path": job.target,
        "tp_size": max(1, job.gpus),
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "sampling_defaults": "openai",  # not the model's generation_config
        "trust_remote_code": False,
        "mem_fraction_static": job.memory_share - 0.05,  # weights and KV cache; CUDA graphs come on top
        "random_seed": job.seed,
        **(draft if job.draft else {}),
    }


def counts(outputs: list[dict[str, Any]], proposals: int) -> Counts:
    """Sums over requests."""
    histogram = [0] * (proposals + 1)
    for output in outputs:
        for accepted, rounds in enumerate(output["meta_info"].get(HISTOGRAM) or ()):
            histogram[accepted] += rounds
    rounds = sum(histogram)
    by_position = [sum(histogram[index:]) for index in range(1, proposals + 1)]
    return Counts(rounds, rounds * proposals, sum(by_position), by_position)


def _margins(meta: dict[str, Any]) -> list[float]:
    """Distance of the two best logprobs at each token."""
    return [position[0][0] - position[1][0] for position in meta["output_top_logprobs"]]


if __name__ == "__main__":
    serve(Sglang)
