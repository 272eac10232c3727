"""The frozen target: features, final hidden states and the head that teaches, without logits at every position."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from draft_model.drafts.batch import Batch
from draft_model.drafts.transfer import to_device
from draft_model.errors import DraftModelError
from draft_model.target.fused import fuse, multiplier

logger = logging.getLogger(__name__)


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
            self.decoder.layers[layer - 1].register_forward_hook(self._take(layer))

    def _take(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self._taken[layer] = output[0] if isinstance(output, tuple) else output

        return hook

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

        Under causal attention no real token sees the padding on the right, so there is no mask.

        Returns:
            Per conversation the features and the hidden states after the final norm, [T_b, nH + H].
        """
        final = self.decoder(input_ids=to_device(batch.tokens, self.device), use_cache=False).last_hidden_state
        states = torch.cat((self.features(), final), -1)
        return [states[row, :length] for row, length in enumerate(batch.lengths.tolist())]


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
    return Target(check_structure(load_model(folder, dtype).to(device), aux_layers), aux_layers)


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
