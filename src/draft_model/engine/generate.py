"""vLLM answers prompts as they come: continuous batching and prefix caching, in a process of its own.

A conversation's next prompt goes in as soon as its answer is there; nothing waits for a batch.
"""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import asdict, dataclass
from itertools import chain
from queue import SimpleQueue

from draft_model import engine as engines


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, in vLLM's words; these defaults are what engines take where a model says nothing."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Settings:
    """What a process generates with."""

    model: str  # folder of the target
    context: int  # tokens of prompt and answer together, at most
    sampling: Sampling
    end_tokens: list[int]
    gpus: int  # that the target is split over; 0: on the CPU


@dataclass(frozen=True)
class Request:
    """One prompt."""

    id: int
    prompt: list[int]
    max_new_tokens: int
    seed: int  # of its sampling


@dataclass(frozen=True)
class Answer:
    """What was generated for a prompt."""

    id: int  # of the request
    tokens: list[int]  # without the end token
    finish: str  # stop, or length where it was cut


class VllmGenerator(engines.Process):
    """A process that generates. `devices` is its CUDA_VISIBLE_DEVICES; None leaves it."""

    in_flight = 1280  # conversations at once: more than the 1,024 that vLLM batches by default on the largest GPUs
    continuous = True
    enlarge, lower = "tp_size", "max_length"

    def __init__(self, settings: Settings, devices: str | None = None) -> None:
        environment = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
        super().__init__("generate", settings, threading.TIMEOUT_MAX, environment)
        self.name = "regenerate_answers: vllm"

    def submit(self, request: Request) -> None:
        """Sends a prompt; its answer comes in any order."""
        self.send(asdict(request))

    def next(self) -> Answer:
        """Waits for the next answer.

        Raises:
            DraftModelError: when the process has failed; says why.
        """
        return Answer(**self.receive())


def main() -> None:
    """Generates until the standard input ends, which it does with the process that started this one."""
    from draft_model.engine.vllm import set_variables

    answers = engines.begin()
    settings = json.loads(sys.stdin.readline())
    requests: SimpleQueue[str] = SimpleQueue()

    def receive() -> None:
        for line in chain(sys.stdin, [""]):
            requests.put(line)

    threading.Thread(target=receive, daemon=True).start()
    set_variables(settings["gpus"])
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    engine = LLM(
        model=settings["model"], dtype="auto" if settings["gpus"] else "float32", max_model_len=settings["context"],
        tensor_parallel_size=max(1, settings["gpus"]), enforce_eager=not settings["gpus"], generation_config="vllm",
        skip_tokenizer_init=True, enable_prefix_caching=True, trust_remote_code=False, seed=0,
    ).llm_engine  # fmt: skip
    sampling = settings["sampling"]
    while True:
        busy = engine.has_unfinished_requests()
        while not busy or not requests.empty():
            if not (line := requests.get()):
                return
            request = Request(**json.loads(line))
            params = SamplingParams(
                **sampling, max_tokens=request.max_new_tokens, seed=request.seed if sampling["temperature"] else None,
                stop_token_ids=settings["end_tokens"], detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            (prompt,) = engine.renderer.render_cmpl([{"prompt_token_ids": request.prompt}])
            engine.add_request(str(request.id), prompt, params)
            busy = True
        for done in engine.step():
            if done.finished:
                output = done.outputs[0]
                tokens = list(output.token_ids)
                if output.finish_reason == "stop" and tokens and tokens[-1] in settings["end_tokens"]:
                    tokens.pop()
                answer = Answer(int(done.request_id), tokens, output.finish_reason or "length")
                print(json.dumps(asdict(answer)), file=answers, flush=True)


if __name__ == "__main__":
    main()
