"""One training step of vLLM speculators: its draft model with its losses and AdamW, on the scene of the benchmark.

Conversations are packed into one row with document ids, as its data loader does. What that loader alone imports (the
OpenAI client, datasets) is replaced by empty stand-ins where it is not installed.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

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


class _StandIns:
    """Finds empty modules for packages that are not installed and that the step does not use."""

    names = frozenset(name for name in ("openai", "datasets", "pyarrow") if not importlib.util.find_spec(name))

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        """A specification of an empty package."""
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """A module each of whose attributes is an empty class."""
        module = types.ModuleType(spec.name)
        module.__getattr__ = self._attribute
        return module

    @staticmethod
    def _attribute(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def build(scene: Scene, attention: str) -> Callable[[], torch.Tensor]:
    """Its model on a folder that holds the target's embedding, norm and head, which is all it reads of it."""
    sys.meta_path.append(_StandIns())
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash.core import DFlashDraftModel
    from speculators.models.dspark.core import DSparkDraftModel
    from speculators.models.eagle3.core import Eagle3DraftModel

    target, config = scene.model, scene.shape.llama()
    folder = tempfile.TemporaryDirectory()
    target.config.save_pretrained(folder.name)
    tensors = {
        "model.embed_tokens.weight": target.model.embed_tokens.weight,
        "model.norm.weight": target.model.norm.weight,
        "lm_head.weight": target.lm_head.weight,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder.name) / "model.safetensors")
    implementation = "fused" if scene.device.type == "cuda" else "eager"
    given: dict[str, Any] = {"verifier_name_or_path": folder.name, "draft_attn_impl": attention,
                             "target_layer_ids": list(AUX_LAYERS)}  # fmt: skip
    if scene.family == "eagle3":
        config.num_hidden_layers = 1
        given |= {"t2d": scene.t2d.cpu(), "d2t": scene.d2t.cpu(), "draft_vocab_size": scene.shape.draft_vocab,
                  "norm_before_residual": False, "ttt_steps": TTT_LENGTH}  # fmt: skip
        kind, call = Eagle3DraftModel, {"loss_config": resolve_loss_config("kl_div", implementation),
                                        "ttt_steps": TTT_LENGTH, "ttt_step_loss_decay": 0.8}  # fmt: skip
    else:
        from transformers import Qwen3Config

        config = Qwen3Config(**config.to_dict() | {"num_hidden_layers": BLOCK_LAYERS, "model_type": "qwen3"})
        given |= {"draft_vocab_size": scene.shape.vocab, "block_size": scene.block_size,
                  "mask_token_id": scene.shape.vocab - 1, "markov_rank": MARKOV_RANK}  # fmt: skip
        kind = DSparkDraftModel if scene.family == "dspark" else DFlashDraftModel
        loss = '{"ce": 0.1, "tv": 0.9}' if scene.family == "dspark" else "kl_div"
        call = {"loss_config": resolve_loss_config(loss, implementation), "gamma": DECAY_GAMMA,
                "max_anchors": ANCHORS * scene.shape.batch}  # fmt: skip
        if scene.family == "dspark":
            call["tv_loss_fn"] = resolve_loss_config("tv", implementation)["tv"][0]
    draft = kind.from_training_args(config, **given).to(scene.device, scene.dtype)
    # It norms the states itself, so that the target's forward pass stops before the final norm.
    target.model.norm = torch.nn.Identity()
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    features = Features(target)
    tokens, loss_mask = scene.tokens.flatten().unsqueeze(0), scene.loss_mask.flatten().unsqueeze(0)
    batch, length = scene.tokens.shape
    documents = torch.arange(batch, device=scene.device).repeat_interleave(length).unsqueeze(0)
    positions = 1 + torch.arange(length, device=scene.device).repeat(batch).unsqueeze(0)

    def step() -> torch.Tensor:
        hidden, final = features(scene.tokens)
        _, loss, _ = draft(
            hidden_states=hidden.flatten(0, 1).unsqueeze(0),
            input_ids=tokens,
            document_ids=documents,
            loss_mask=loss_mask,
            position_ids=positions,
            verifier_last_hidden_states=final.flatten(0, 1).unsqueeze(0),
            **call,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    serve(build)
