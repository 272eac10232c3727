"""SGLang measures a job: `python -m draft_model.engine.sglang job.json measured.json`. It needs a GPU."""

from __future__ import annotations

from typing import Any

from draft_model.engine import Counts, Job, Measured, serve, time_batches


def run(job: Job) -> Measured:
    """Decodes the prompts; SGLang counts each request's rounds."""
    import sglang  # type: ignore[import-not-found]
    import torch

    gpus = torch.cuda.device_count()
    engine: Any = sglang.Engine(**arguments(job, gpus))

    def generate(prompts: list[list[int]], temperature: float = 0.0, logprobs: bool = False) -> list[dict[str, Any]]:
        sampling = {
            "temperature": temperature, "max_new_tokens": job.max_new_tokens, "stop_token_ids": job.end_tokens,
        }  # fmt: skip
        more = {"return_logprob": True, "top_logprobs_num": 2} if logprobs else {}
        outputs: list[dict[str, Any]] = engine.generate(input_ids=prompts, sampling_params=sampling, **more)
        return outputs

    everything = [prompt for group in job.groups for prompt in group]
    greedy = [generate(group, logprobs=not job.draft) for group in job.groups]
    measured = Measured(
        engine=f"SGLang {sglang.__version__}",
        hardware=f"{gpus} x {torch.cuda.get_device_name(0)}",
        dtype=str(engine.server_args.dtype).replace("auto", "bfloat16"),
        outputs=[[list(output["output_ids"]) for output in group] for group in greedy],
        margins=[] if job.draft else [[_margins(output["meta_info"]) for output in group] for group in greedy],
        counts=[counts(group, job.proposals) for group in greedy] if job.draft else [],
        sampled=counts(generate(everything, job.temperature), job.proposals) if job.draft and job.temperature else None,
        speed=time_batches(job, True, lambda batch: sum(len(output["output_ids"]) for output in generate(batch))),
    )
    engine.shutdown()
    return measured


def arguments(job: Job, gpus: int) -> dict[str, Any]:
    """Arguments of `sglang.Engine` (0.5.23)."""
    draft = {
        "speculative_algorithm": job.method.upper(),
        "speculative_draft_model_path": job.draft,
        "speculative_num_steps": job.proposals,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": job.proposals + 1,
    }
    return {
        "model_path": job.target,
        "tp_size": max(1, gpus),
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "sampling_defaults": "openai",  # not the model's generation_config
        "trust_remote_code": False,
        "random_seed": job.seed,
        **(draft if job.draft else {}),
    }


def counts(outputs: list[dict[str, Any]], proposals: int) -> Counts:
    """Sums over requests; the histogram has how many rounds accepted 0, 1, ... proposals."""
    histogram = [0] * (proposals + 1)
    for output in outputs:
        for accepted, rounds in enumerate(output["meta_info"].get("spec_accept_histogram") or ()):
            histogram[accepted] += rounds
    rounds = sum(histogram)
    by_position = [sum(histogram[index:]) for index in range(1, proposals + 1)]
    return Counts(rounds, rounds * proposals, sum(by_position), by_position)


def _margins(meta: dict[str, Any]) -> list[float]:
    """Distance of the two best logprobs at each token."""
    return [position[0][0] - position[1][0] for position in meta["output_top_logprobs"]]


if __name__ == "__main__":
    serve(run)
