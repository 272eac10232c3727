"""SGLang as an engine's process: `python -m draft_model.engine.sglang`. It needs a GPU."""

from __future__ import annotations

from typing import Any

from draft_model.engine import Counts, Engine, Job, serve

HISTOGRAM = "spec_correct_drafts_histogram"
"""In a request's meta_info: in how many rounds 0, 1, ... proposals were kept."""


class Sglang(Engine):
    """SGLang with one job's target."""

    def __init__(self, job: Job) -> None:
        import sglang  # type: ignore[import-not-found]

        self.job, self.engine = job, sglang.Engine(**arguments(job))

    def describe(self) -> tuple[str, str, str]:
        """As of every engine."""
        import sglang
        import torch

        hardware = f"{self.job.gpus} x {torch.cuda.get_device_name(0)}"
        return f"SGLang {sglang.__version__}", hardware, str(self.engine.server_args.dtype).replace("auto", "bfloat16")

    def decode(
        self, prompts: list[list[int]], temperature: float = 0.0, margins: bool = False
    ) -> tuple[list[list[int]], list[list[float]], Counts]:
        """As of every engine."""
        more = {"return_logprob": True, "top_logprobs_num": 2} if margins else {}
        outputs: list[dict[str, Any]] = self.engine.generate(
            input_ids=prompts, sampling_params=sampling(self.job, temperature), **more
        )
        best = [output["meta_info"]["output_top_logprobs"] for output in outputs] if margins else []
        apart = [[position[0][0] - position[1][0] for position in reply] for reply in best]
        return [list(output["output_ids"]) for output in outputs], apart, counts(outputs, self.job.proposals)


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


if __name__ == "__main__":
    serve(Sglang)
