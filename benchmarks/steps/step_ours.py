"""One training step of this project."""

from __future__ import annotations

from collections.abc import Callable

import torch

from common import (
    ANCHORS,
    AUX_LAYERS,
    BLOCK_LAYERS,
    DECAY_GAMMA,
    LEARNING_RATE,
    MARKOV_RANK,
    MAX_GRAD_NORM,
    PROPOSALS,
    TTT_LENGTH,
    Scene,
    serve,
)  # fmt: skip
from draft_model import drafts
from draft_model.drafts.batch import collate
from draft_model.drafts.files import vocabulary_of
from draft_model.drafts.layers import cast_once
from draft_model.target.model import Target
from draft_model.training.optimizer import Gradients


def build(scene: Scene, attention: str) -> Callable[[], torch.Tensor]:
    """The trainer's own parts: target, objective, clipping, AdamW."""
    family = drafts.family(scene.family)
    settings = {"draft_vocab_size": scene.shape.draft_vocab, "eagle_aux_hidden_state_layer_ids": list(AUX_LAYERS)}
    if scene.family != "eagle3":
        settings = {"num_hidden_layers": BLOCK_LAYERS, "num_anchors": ANCHORS, "loss_decay_gamma": DECAY_GAMMA,
                    "markov_rank": MARKOV_RANK if scene.family == "dspark" else 0,
                    "target_layer_ids": [layer - 1 for layer in AUX_LAYERS]}  # fmt: skip
    config = family.adapt(family.default_shape(scene.model.config.to_dict(), PROPOSALS), settings)
    target = Target(scene.model, config.aux_layers)
    known = (scene.t2d.cpu(), scene.d2t.cpu()) if scene.family == "eagle3" else vocabulary_of({}, config)
    draft = family.create(config, *known)
    draft.initialise(0, target)
    draft.to(scene.device)
    objective = family.objective(
        draft, target, TTT_LENGTH, attention, scene.dtype, scene.shape.tokens, family.default_loss
    )
    gradients = Gradients(draft.parameters())
    optimizer = torch.optim.AdamW(draft.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batch = collate(list(zip(scene.tokens.cpu(), scene.loss_mask.cpu(), strict=True)))

    def step() -> torch.Tensor:
        gradients.clear()
        with cast_once(draft, scene.dtype):
            loss, sums = objective(batch, target.states(batch))
            loss.backward()
        norm = gradients.norm(sums.supervised[0])
        useful = norm.isfinite() & (sums.supervised[0] > 0)
        gradients.update(optimizer, sums.supervised[0], norm, MAX_GRAD_NORM, useful)
        return loss.detach() / sums.supervised[0]

    return step


if __name__ == "__main__":
    serve(build)
