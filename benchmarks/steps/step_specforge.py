"""One training step of SpecForge: its draft, its unroll and its optimizer, on the scene of the benchmark.

On a CPU two things are replaced: the module `triton` by an empty stand-in, and the Triton loss by the package's own
reference `_compute_loss`. On a GPU both are its own.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import torch

from common import (
    ANCHORS,
    AUX_LAYERS,
    BLOCK_LAYERS,
    DECAY_GAMMA,
    LEARNING_RATE,
    MARKOV_RANK,
    MAX_GRAD_NORM,
    TTT_LENGTH,
    Features,
    Scene,
    serve,
)  # fmt: skip


def _stand_in_for_triton() -> None:
    """An importable `triton` whose decorator hands the function back."""
    importlib.import_module("torch._inductor.compile_fx")  # before the stand-in, which must not pass for the real one
    language, triton = types.ModuleType("triton.language"), types.ModuleType("triton")
    language.constexpr = object  # type: ignore[attr-defined]
    triton.jit, triton.language = (lambda function: function), language  # type: ignore[attr-defined]
    triton.__spec__, language.__spec__ = ModuleSpec("triton", None), ModuleSpec("triton.language", None)
    sys.modules |= {"triton": triton, "triton.language": language}


def build(scene: Scene, attention: str) -> Callable[[], torch.Tensor]:
    """SpecForge's parts, wired as its strategies and its trainer do."""
    return (build_chain if scene.family == "eagle3" else build_blocks)(scene, attention)


def build_blocks(scene: Scene, attention: str) -> Callable[[], torch.Tensor]:
    """Its DFlash, which learns the data's tokens, or its DSpark, which learns the target's probabilities."""
    if scene.device.type == "cpu":
        _stand_in_for_triton()
    from specforge.algorithms.common import dflash_family_model as models
    from specforge.modeling.draft.dflash import DFlashDraftModel
    from specforge.modeling.draft.dspark import DSparkDraftModel
    from specforge.optimizer import BF16Optimizer
    from transformers import Qwen3Config

    spark, target = scene.family == "dspark", scene.model
    config: Any = Qwen3Config(
        **scene.shape.llama().to_dict() | {"num_hidden_layers": BLOCK_LAYERS, "model_type": "qwen3"}
    )
    config.layer_types, config._attn_implementation = ["full_attention"] * BLOCK_LAYERS, attention
    config.num_target_layers, config.block_size = target.config.num_hidden_layers, scene.block_size
    mask = scene.shape.vocab - 1
    config.dflash_config = {"mask_token_id": mask, "target_layer_ids": [layer - 1 for layer in AUX_LAYERS]}
    if spark:
        config.dflash_config |= {
            "projector_type": "dspark", "markov_rank": MARKOV_RANK, "markov_head_type": "vanilla",
            "enable_confidence_head": True, "confidence_head_with_markov": True,
        }  # fmt: skip
    draft: Any = (DSparkDraftModel if spark else DFlashDraftModel)(config).to(scene.device, scene.dtype)
    model = (models.OnlineDSparkModel if spark else models.OnlineDFlashModel)(
        draft, target.lm_head, target.model.embed_tokens, mask, scene.block_size, attention_backend=attention,
        num_anchors=ANCHORS, loss_decay_gamma=DECAY_GAMMA,
    )  # fmt: skip
    optimizer = BF16Optimizer(draft, LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, total_steps=1_000)
    features, loss_mask = Features(target), scene.loss_mask.long()

    def step() -> torch.Tensor:
        hidden, final = features(scene.tokens)
        last = {"target_last_hidden_states": final} if spark else {}
        loss: torch.Tensor = model(scene.tokens, hidden, loss_mask, **last)[0]
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def build_chain(scene: Scene, attention: str) -> Callable[[], torch.Tensor]:
    """Its EAGLE-3."""
    on_cpu = scene.device.type == "cpu"
    if on_cpu:
        _stand_in_for_triton()
    from specforge.algorithms.eagle3 import model as eagle3
    from specforge.core.loss import _compute_loss
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from specforge.optimizer import BF16Optimizer
    from specforge.utils import padding

    if on_cpu:
        eagle3.LogSoftmaxLoss = types.SimpleNamespace(apply=_compute_loss)
    config: Any = scene.shape.llama()
    config.draft_vocab_size, config.num_hidden_layers, config.pad_token_id = scene.shape.draft_vocab, 1, 0
    config.rope_theta, config.rope_scaling = 10_000.0, None
    draft = LlamaForCausalLMEagle3(config, attention_backend=attention).to(scene.device, scene.dtype)
    draft.t2d.copy_(scene.t2d)
    draft.d2t.copy_(scene.d2t)
    draft.embed_tokens.weight.data.copy_(scene.model.model.embed_tokens.weight)
    draft.freeze_embedding()
    model = eagle3.OnlineEagle3Model(draft_model=draft, length=TTT_LENGTH, attention_backend=attention)
    optimizer = BF16Optimizer(draft, LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, total_steps=1_000)
    features = Features(scene.model)
    attention_mask = torch.ones_like(scene.tokens)

    def step() -> torch.Tensor:
        hidden, final = features(scene.tokens)
        with torch.no_grad():  # what its TargetHead does: all positions, all logits, shifted by one
            target = scene.model.lm_head(padding(final, left=False))
        losses = model(
            input_ids=padding(scene.tokens, left=False),
            attention_mask=attention_mask,
            target=target,
            loss_mask=scene.loss_mask.long().unsqueeze(-1),
            hidden_states=hidden,
        )[0]
        del target
        total: torch.Tensor = sum(0.8**place * loss for place, loss in enumerate(losses))
        total.backward()
        optimizer.step()
        return total.detach()

    return step


if __name__ == "__main__":
    serve(build)
