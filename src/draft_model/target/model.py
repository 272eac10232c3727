"""The frozen target: features, final hidden states and the head that teaches, without logits at every position.

On a GPU, what a model does between its matrix products (norms, rotation, SwiGLU) is one kernel each. transformers runs
these as five to ten kernels, which is a tenth of the target's time. Each is replaced only where a probe shows that the
replacement gives what the model's own code gives, up to the rounding of its type.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from draft_model.drafts import kernels
from draft_model.drafts.batch import Batch, to_device
from draft_model.entrypoint import GC_THRESHOLD
from draft_model.errors import DraftModelError

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt
PASS_COST = 32  # tokens that cost a CPU as much as a pass of its own; measured with SmolLM2-135M


class Target:
    """A causal language model of transformers, frozen; features are taken after the `aux_layers`."""

    spread = False
    """Whether its layers are spread over the copies of other processes, so that all must run it equally often."""

    def __init__(self, model: Any, aux_layers: tuple[int, ...]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.decoder = model.get_decoder()
        self.config = model.config.get_text_config()
        self.aux_layers = aux_layers
        self.device = next(model.parameters()).device
        self._taken: dict[int, Tensor] = {}
        if self.device.type == "cuda":
            fuse(self.decoder)
        for layer in aux_layers:
            self.decoder.layers[layer - 1].register_forward_hook(functools.partial(self._take, layer))

    def _take(self, layer: int, _module: Any, _inputs: Any, output: Any) -> None:
        self._taken[layer] = output[0] if isinstance(output, tuple) else output

    @property
    def embedding(self) -> Tensor:
        """The input embeddings, [V, H]."""
        return self.model.get_input_embeddings().weight  # type: ignore[no-any-return]

    @property
    def head(self) -> Tensor:
        """The output head, [V, H]."""
        return self.model.get_output_embeddings().weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """The output head's bias, [V], where it has one."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def norm(self) -> Tensor:
        """What the final norm multiplies by, [H]: its weight, or 1 + weight in Gemma."""
        return multiplier(self.decoder.norm)

    @property
    def last_layer(self) -> dict[str, Tensor]:
        """The last decoder layer's weights by name, such as `mlp.down_proj.weight`; norms as what they multiply by."""
        layer = self.decoder.layers[-1]
        norms = {name: module for name, module in layer.named_children() if name.endswith("layernorm")}
        weights: dict[str, Tensor] = dict(layer.named_parameters())
        return weights | {f"{name}.weight": multiplier(module) for name, module in norms.items()}

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: [..., H] -> [..., V]."""
        return head_logits(hidden, self.head, self.bias, self.config)

    def features(self) -> Tensor:
        """The features of the last forward pass, [B, T, nH]."""
        return torch.cat([self._taken[layer] for layer in self.aux_layers], -1)

    @torch.no_grad()
    def states(self, batch: Batch) -> list[Tensor]:
        """Runs the decoder over whole conversations, a batch on the host.

        Under causal attention no real token sees the padding on the right, so there is no mask. A CPU, which padding
        costs as much as tokens do, takes one conversation at a time where that saves more than a pass costs.

        Returns:
            Per conversation the features and the hidden states after the final norm, [T_b, nH + H].
        """
        lengths = batch.lengths.tolist()
        padding = batch.tokens.numel() - sum(lengths)
        if self.device.type == "cpu" and not self.spread and padding > PASS_COST * len(lengths):
            return [self._run(row[None, :length])[0] for row, length in zip(batch.tokens, lengths, strict=True)]
        states = self._run(to_device(batch.tokens, self.device))
        return [states[row, :length] for row, length in enumerate(lengths)]

    def _run(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, nH + H]."""
        final = self.decoder(input_ids=tokens, use_cache=False).last_hidden_state
        return torch.cat([*(self._taken[layer] for layer in self.aux_layers), final], -1)


def head_logits(hidden: Tensor, head: Tensor, bias: Tensor | None, config: Any) -> Tensor:
    """What models make of their final hidden states with head [V, H] and bias [V]: [..., H] -> [..., V].

    Granite divides the logits, Cohere multiplies them, Gemma caps them, as the text model's config says.
    """
    logits = functional.linear(hidden, head, bias)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def load_target(folder: Path, aux_layers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Target:
    """Loads an imported model; raises DraftModelError as `load_model` and `check_structure` do."""
    if device.type == "cpu":
        _keep_freed_memory()
    return Target(check_structure(load_model(folder, dtype).to(device), aux_layers), aux_layers)


def _keep_freed_memory() -> None:
    """Has glibc keep what is freed: pages that go back to the system cost every pass of a CPU 5 % when they return."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and any(mallopt(_M_MMAP_THRESHOLD, size) for size in (2**31 - 1, 32 << 20)):  # old: 32 MiB
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_ARENA_MAX, 1)


def load_model(folder: Path, dtype: torch.dtype, auto_class: Any = None, **settings: Any) -> Any:
    """Loads an imported model with transformers, from safetensors and without code of its own.

    FP8 weights are dequantised, on a GPU too: the training reads the last layer's, and multiplies in the compute type.
    The class is that for text generation unless another is given; settings are those of `from_pretrained`.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    load = (auto_class or AutoModelForCausalLM).from_pretrained
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        found = [getattr(part, "quantization_config", None) for part in (config, config.get_text_config())]
        quantisation: dict[str, Any] = found[0] or found[1] or {}
        if fp8 := quantisation.get("quant_method") == "fp8":
            logger.info("the target's FP8 weights are dequantised to %s", str(dtype).removeprefix("torch."))
            quantisation["dequantize"] = True  # FineGrainedFP8Config as an argument would drop modules_to_not_convert
        model = load(folder, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True, **settings)
        gc.set_threshold(*GC_THRESHOLD)  # which the entry points raise until the libraries are loaded
        return model.to(dtype) if fp8 else model  # what is not quantised keeps its own type otherwise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DraftModelError(f"the target model in {folder} cannot be loaded: {error}") from error


def check_structure(model: Any, aux_layers: tuple[int, ...]) -> Any:
    """Gives a model of transformers back where features can be taken from it, else raises DraftModelError."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or not hasattr(decoder, "layers") or not hasattr(decoder, "norm"):
        raise DraftModelError(
            f"the target model ({type(model).__name__}) has no decoder layers that features could be taken from; "
            "allowed: a decoder-only text-generation model of Llama's structure"
        )
    if not 1 <= min(aux_layers) <= max(aux_layers) < len(decoder.layers):
        raise DraftModelError(
            f"draft_model_config: `eagle_aux_hidden_state_layer_ids` is {list(aux_layers)}; the target model has "
            f"{len(decoder.layers)} layers, allowed: 1 to {len(decoder.layers) - 1}"
        )
    return model


def multiplier(norm: Any) -> Tensor:
    """What an RMSNorm multiplies by, [H]: its weight, or 1 + weight in Gemma."""
    weight: Tensor = norm.weight
    # Ones pass a norm unchanged but for its epsilon, so what comes out tells weight from 1 + weight.
    passed: Tensor = norm(torch.ones_like(weight))
    return weight + (passed - weight).round()


@torch.no_grad()
def fuse(decoder: Any) -> None:
    """Replaces parts of a decoder of transformers, on a GPU, by kernels that compute the same."""
    weight = next(decoder.parameters())
    done = 0
    for module in decoder.modules():
        if all(type(parameter.data) is Tensor for parameter in module.parameters(recurse=False)):  # else it is spread
            done += sum(_replaced(module, candidate) for candidate in (_norm, _mlp))
    attention = getattr(decoder.layers[0], "self_attn", None)
    if attention is not None:
        _fuse_rotation(sys.modules[type(attention).__module__], weight)
    logger.info("target: %d modules run as fused kernels", done)


def _replaced(module: Any, candidate: Callable[[Any], tuple[Callable[[Tensor], Tensor], int] | None]) -> bool:
    """Whether a module's forward was replaced by a candidate that gives the same."""
    found = candidate(module)
    if found is None:
        return False
    forward, size = found
    like = next(module.parameters())
    probe = torch.randn(8, size, device=like.device, dtype=like.dtype)
    if not _alike(forward(probe), module(probe)):
        return False
    module.forward = forward
    return True


def _alike(value: Tensor, truth: Tensor) -> bool:
    """Whether two results differ by no more than the rounding of their type."""
    return bool((value - truth).float().norm() <= 2 * torch.finfo(truth.dtype).eps * truth.float().norm())


def _norm(module: Any) -> tuple[Callable[[Tensor], Tensor], int] | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or eps is None or getattr(module, "weight", None) is None:
        return None
    weight = multiplier(module)

    def forward(x: Tensor) -> Tensor:
        return kernels.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)[0].view(x.shape)

    return forward, len(weight)


def _mlp(module: Any) -> tuple[Callable[[Tensor], Tensor], int] | None:
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(type(part) is not torch.nn.Linear or type(part.weight.data) is not Tensor for part in parts):
        return None
    gate, up, down = parts

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        product: Tensor = down(kernels.swiglu(gate(rows), up(rows)))
        return product.view(x.shape)

    return forward, gate.in_features


def _fuse_rotation(module: Any, like: Tensor) -> None:
    """Replaces a modeling module's `apply_rotary_pos_emb` where no gradient is asked for."""
    original = getattr(module, "apply_rotary_pos_emb", None)
    if original is None or hasattr(original, "fused"):
        return
    if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return
    from draft_model.drafts import triton_kernels

    @functools.wraps(original)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        whole = q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] and cos.shape[1] == q.shape[2]
        if torch.is_grad_enabled() or not q.is_cuda or not whole or rest or named:
            return original(q, k, cos, sin, *rest, **named)
        cos, sin = cos.contiguous(), sin.contiguous()
        return triton_kernels.rotate(q, cos, sin), triton_kernels.rotate(k, cos, sin)

    rotate.fused = True  # type: ignore[attr-defined]
    q, k = (torch.randn(2, 5, n, 16, device=like.device, dtype=like.dtype).transpose(1, 2) for n in (4, 2))
    angles = torch.randn(2, 5, 8, device=like.device).repeat(1, 1, 2)
    tables = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
    pairs = zip(rotate(q, k, *tables), original(q, k, *tables), strict=True)
    if all(_alike(mine, theirs) for mine, theirs in pairs):
        module.apply_rotary_pos_emb = rotate
