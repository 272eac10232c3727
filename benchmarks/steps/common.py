"""What the timed trainers share: the shapes, a random target with one batch, and the loop that obeys the benchmark.

Every trainer gets the very same target, tokens, loss mask and draft vocabulary. A random target's favourite tokens lie
anywhere in its vocabulary, so the draft vocabulary is made of its favourites on this batch first, as a real one covers
what the target says: every supervised position then costs its full work.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

TARGET_LAYERS = 8
AUX_LAYERS = (2, 4, 5)
TTT_LENGTH = 7
BLOCK_LAYERS = 2
PROPOSALS = 7
ANCHORS = 256
"""Blocks of a conversation in a step of dflash or dspark."""
MARKOV_RANK = 256
DECAY_GAMMA = 4.0
LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 0.5


@dataclass(frozen=True)
class Shape:
    """One row of the benchmark; H, I, V, D as in docs/architecture.md."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    draft_vocab: int
    batch: int
    tokens: int
    target_layers: int = TARGET_LAYERS

    def llama(self) -> Any:
        """The target's configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.target_layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            max_position_embeddings=self.tokens + 64,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("small", 256, 768, 4, 2, 2_048, 1_024, 2, 512),
        Shape("medium", 512, 1_536, 8, 2, 32_000, 8_000, 2, 1_024),
        Shape("long", 512, 1_536, 8, 2, 32_000, 8_000, 1, 4_096),
        Shape("wide", 512, 1_536, 8, 2, 32_000, 32_000, 1, 4_096),
        Shape("gpu-2x2048", 4_096, 14_336, 32, 8, 128_256, 32_000, 2, 2_048),
        Shape("gpu-1x8192", 4_096, 14_336, 32, 8, 128_256, 32_000, 1, 8_192),
    )
}


@dataclass(frozen=True)
class Scene:
    """A random target and one batch."""

    shape: Shape
    model: Any  # the target, frozen
    tokens: Tensor  # int64 [B, T]
    loss_mask: Tensor  # bool [B, T], True on the assistant's tokens: all after the prompt
    t2d: Tensor  # bool [V]
    d2t: Tensor  # offsets, int64 [D]
    device: torch.device  # of all of these
    dtype: torch.dtype  # of the target
    family: str  # eagle3, dflash or dspark

    @property
    def block_size(self) -> int:
        """Positions of a block: DFlash's anchor proposes nothing."""
        return PROPOSALS + (self.family == "dflash")


def make_batch(shape: Shape, supervised: float) -> tuple[Tensor, Tensor]:
    """Random tokens int64 [B, T] and the loss mask bool [B, T]; see `make_scene`."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape.vocab, (shape.batch, shape.tokens), generator=generator)
    loss_mask = torch.zeros(tokens.shape, dtype=torch.bool)
    loss_mask[:, round(shape.tokens * (1.0 - supervised)) :] = True
    return tokens, loss_mask


def make_scene(shape: Shape, supervised: float, device: torch.device, dtype: torch.dtype, family: str) -> Scene:
    """Makes target and batch, the same for every trainer.

    Args:
        shape: of both.
        supervised: share of each conversation that is the assistant's; the prompt stands before it.
        device: where they are made.
        dtype: of the target.
        family: of the draft.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(shape.llama()).to(dtype).eval().requires_grad_(False)
    tokens, loss_mask = (tensor.to(device) for tensor in make_batch(shape, supervised))
    t2d = torch.zeros(shape.vocab, dtype=torch.bool, device=device)
    with torch.no_grad():
        states = model.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        for rows in states.split(512):
            t2d[model.lm_head(rows).argmax(-1)] = True
    room = shape.draft_vocab - int(t2d.sum())
    t2d[(~t2d).nonzero()[:, 0][: max(room, 0)]] = True
    ids = t2d.nonzero()[:, 0][: shape.draft_vocab]
    t2d = torch.zeros_like(t2d)
    t2d[ids] = True
    d2t = ids - torch.arange(len(ids), device=device)
    return Scene(shape, model, tokens, loss_mask, t2d, d2t, device, dtype, family)


class Features:
    """The target's forward pass as the peers get it here: hooks for the three features, no logits."""

    def __init__(self, model: Any) -> None:
        self.model, self._taken = model, {}
        for layer in AUX_LAYERS:
            model.model.layers[layer - 1].register_forward_hook(self._take(layer))

    def _take(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self._taken[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, T, 3H] and the states after the final norm [B, T, H]."""
        final = self.model.model(tokens, use_cache=False).last_hidden_state
        return torch.cat([self._taken[layer] for layer in AUX_LAYERS], -1), final


def now(device: torch.device) -> float:
    """Seconds, after all work of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Peak of this process in bytes: resident memory, or the GPU's where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(build: Callable[[Scene, str], Callable[[], Tensor]]) -> None:
    """Obeys the benchmark: a line of settings makes a scene, `step` does a step, `free` lets the scene go.

    Answers in JSON lines; what fails is answered as an error, and the next scene may do better.

    Args:
        build: makes the trainer of a scene and an attention backend; what it returns does one whole step, from the
            target's forward pass to the changed weights, and gives the loss.
    """
    step: Callable[[], Tensor] | None = None
    device = torch.device("cpu")
    for line in sys.stdin:
        try:
            if line.startswith("{"):
                settings = json.loads(line)
                step = None
                torch.set_num_threads(settings["threads"])
                device = torch.device(settings["device"])
                shape = replace(SHAPES[settings["shape"]], **settings["changes"])
                if device.type == "cuda":
                    _release()
                    if not settings["empty_cache"]:
                        torch.cuda.empty_cache = lambda: None
                dtype = getattr(torch, settings["dtype"])
                scene = make_scene(shape, settings["supervised"], device, dtype, settings["family"])
                step = build(scene, settings["attention"])
                del scene
                answer: dict[str, Any] = {"ready": True}
            elif line.startswith("free"):
                step = None
                _release()
                answer = {}
            else:
                assert step
                # On a GPU several steps in a row, as in a training: the host may run ahead.
                count = 4 if device.type == "cuda" else 1
                started = now(device)
                for _ in range(count):
                    loss = step()
                seconds = (now(device) - started) / count
                answer = {"seconds": seconds, "loss": float(loss), "peak": peak_memory(device)}
        except Exception as error:  # the benchmark goes on with the other trainers
            traceback.print_exc(limit=-4)
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"}
            step = None
        print(json.dumps(answer), flush=True)


def _release() -> None:
    """Gives memory back to the machine."""
    gc.collect()
    if torch.cuda.is_available():
        _empty_cache()
        torch.cuda.reset_peak_memory_stats()


_empty_cache = torch.cuda.empty_cache
