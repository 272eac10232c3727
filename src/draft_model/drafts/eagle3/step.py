"""One training step's maths, from conversations to the loss: plan, unroll, heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from draft_model.drafts.eagle3.attention import choose_backend
from draft_model.drafts.eagle3.batch import Batch, plan_unroll
from draft_model.drafts.eagle3.model import Eagle3Draft, Rotary
from draft_model.drafts.eagle3.objective import StepSums, Teacher, distillation_loss
from draft_model.drafts.eagle3.unroll import unroll
from draft_model.target.model import Target


class Objective:
    """The loss of a draft against its target.

    Args:
        draft: float32 parameters.
        target: the frozen target, in the compute type.
        steps: unroll length (ttt_length).
        attention_backend: `flex_attention` or `sdpa`.
        dtype: compute type.
        max_length: longest conversation, in tokens.
    """

    def __init__(
        self,
        draft: Eagle3Draft,
        target: Target,
        steps: int,
        attention_backend: str,
        dtype: torch.dtype,
        max_length: int,
    ) -> None:
        self.draft, self.target, self.steps, self.dtype = draft, target, steps, dtype
        self.backend = choose_backend(attention_backend, target.device, dtype)
        self.rotary = Rotary(draft.config, target.device).table(max_length + steps, dtype)
        self.target_ids = draft.target_ids
        self.draft_ids = torch.full((draft.config.vocab_size,), -1, device=target.device)
        self.draft_ids[self.target_ids] = torch.arange(len(self.target_ids), device=target.device)

    def __call__(self, batch: Batch, states: list[Tensor]) -> tuple[Tensor, StepSums]:
        """The loss summed over supervised positions and steps, to be divided by the global count of the former.

        Args:
            batch: B conversations.
            states: what `Target.states` gave for each of them.

        Returns:
            A float32 scalar and the sums per step.
        """
        plan = plan_unroll(batch, self.steps)
        rows = torch.cat(states)  # [sum of T_b, 4H]
        features, final = rows.split((3 * self.draft.config.hidden_size, self.draft.config.hidden_size), -1)
        weights = self.draft.weights(self.dtype)
        embeddings = functional.embedding(batch.tokens.flatten(), self.target.embedding)
        outputs = unroll(weights, self.rotary, embeddings, features, plan, self.backend)
        teacher = Teacher(
            final[plan.teacher_states],
            self.target.logits,
            self.target_ids,
            self.draft_ids,
            self.draft.config.rms_norm_eps,
        )
        return distillation_loss(outputs, weights.norm, self.draft.lm_head.weight, teacher, plan)
