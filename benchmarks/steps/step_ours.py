"""One training step of this project."""

from __future__ import annotations

from collections.abc import Callable

import torch

from common import AUX_LAYERS, LEARNING_RATE, MAX_GRAD_NORM, TTT_LENGTH, Scene, serve
from draft_model.drafts.batch import collate
from draft_model.drafts.eagle3.config import draft_config_for, with_overrides
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.drafts.eagle3.step import Objective
from draft_model.target.model import Target
from draft_model.training.gradients import Gradients


def build(scene: Scene, attention: str) -> Callable[[], torch.Tensor]:
    """The trainer's own parts: target, objective, clipping, AdamW."""
    config = with_overrides(
        draft_config_for(scene.model.config.to_dict()),
        {"draft_vocab_size": scene.shape.draft_vocab, "eagle_aux_hidden_state_layer_ids": list(AUX_LAYERS)},
    )
    target = Target(scene.model, config.aux_layers)
    draft = Eagle3Draft(config, scene.t2d.cpu(), scene.d2t.cpu())
    draft.initialise(0, target)
    draft.to(scene.device)
    objective = Objective(draft, target, TTT_LENGTH, attention, scene.dtype, scene.shape.tokens)
    gradients = Gradients(draft.parameters())
    optimizer = torch.optim.AdamW(draft.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batch = collate(list(zip(scene.tokens.cpu(), scene.loss_mask.cpu(), strict=True)))

    def step() -> torch.Tensor:
        gradients.clear()
        loss, sums = objective(batch, target.states(batch))
        loss.backward()
        norm = gradients.norm(sums.supervised[0])
        useful = norm.isfinite() & (sums.supervised[0] > 0)
        gradients.update(optimizer, sums.supervised[0], norm, MAX_GRAD_NORM, useful)
        return loss.detach() / sums.supervised[0]

    return step


if __name__ == "__main__":
    serve(build)
