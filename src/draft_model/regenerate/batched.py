"""transformers' own `generate` for a batch at a time: for small targets, where there is no engine.

Which conversations share a batch depends on their numbers alone, so rounding is the same wherever a batch runs. Each
row is sampled with a generator of its own: Gumbel noise on the logits makes the greedy choice a draw.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draft_model.engine.generate import Answer, Request, Sampling, Settings
from draft_model.errors import DraftModelError
from draft_model.target.model import load_model


class BatchedGenerator:
    """Answers prompts with transformers, in this process; too little memory is a DraftModelError."""

    in_flight = 16  # prompts at once; a CPU does 16 rows in about the time of one
    continuous = False

    def __init__(self, settings: Settings) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with _memory_errors():
            self._model = load_model(Path(settings.model), dtype).to(device).eval()
        self._settings = settings
        self._waiting: list[Request] = []
        self._answers: deque[Answer] = deque()

    def submit(self, request: Request) -> None:
        """Takes a prompt into the next batch."""
        self._waiting.append(request)

    def next(self) -> Answer:
        """Gives the next answer; with none left, the prompts that wait are the next batch."""
        if not self._answers:
            with _memory_errors():
                self._answers.extend(self._generate(self._waiting))
            self._waiting = []
        return self._answers.popleft()

    def _generate(self, batch: list[Request]) -> list[Answer]:
        ends, longest = self._settings.end_tokens, max(request.max_new_tokens for request in batch)
        prompts = [request.prompt for request in batch]
        answers = []
        rows = generate(self._model, prompts, longest, ends, self._processors(batch))
        for request, row in zip(batch, rows, strict=True):
            row = row[: request.max_new_tokens]
            end = next((index for index, token in enumerate(row) if token in ends), None)
            answers.append(Answer(request.id, row[:end], "length" if end is None else "stop"))
        return answers

    def _processors(self, batch: list[Request]) -> list[Any]:
        from transformers.generation import logits_process as of

        its: Sampling = self._settings.sampling
        penalty, temperature = its.repetition_penalty, its.temperature
        choices: list[tuple[Any, Any, float]] = [  # whether it does something, what applies it, value
            (penalty != 1, of.RepetitionPenaltyLogitsProcessor, penalty),
            (temperature, of.TemperatureLogitsWarper, temperature),
            (temperature and its.top_k, of.TopKLogitsWarper, its.top_k),
            (temperature and its.top_p < 1, of.TopPLogitsWarper, its.top_p),
            (temperature and its.min_p, of.MinPLogitsWarper, its.min_p),
        ]
        chosen = [apply(value) for does, apply, value in choices if does]
        if not temperature:
            return chosen
        generators = [torch.Generator().manual_seed(request.seed) for request in batch]

        def draw(_tokens: Tensor, logits: Tensor) -> Tensor:
            noise = [torch.empty(logits.shape[1]).exponential_(generator=each).log() for each in generators]
            return logits - torch.stack(noise).to(logits.device)

        return [*chosen, draw]


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: list[int], processors: list[Any]
) -> list[list[int]]:
    """New tokens of each prompt by transformers, greedy but for the processors; what follows an end token is padding.

    `generate` fills what a call leaves open from the model's generation_config (penalties, suppressed tokens, beams,
    stop strings): an empty one is put in its place.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(map(len, prompts))
    # A row is filled up with its own first token: a penalty on repetition has seen that anyway.
    rows = [[prompt[0]] * (width - len(prompt)) + [*prompt] for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=0
    )
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
        )
    finally:
        model.generation_config = own
    found: list[list[int]] = output[:, width:].tolist()
    return found


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # a GPU's is a RuntimeError, a CPU's has no type of its own
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise DraftModelError(
            f"regenerate_answers: transformers ran out of memory with {BatchedGenerator.in_flight} conversations at a "
            f"time ({str(error).partition(chr(10))[0]}); lower max_length or regenerate_max_new_tokens, or install "
            "vLLM, which splits the target over tp_size GPUs and takes as many conversations as fit"
        ) from error
