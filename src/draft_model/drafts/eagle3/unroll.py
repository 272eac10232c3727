"""Training-time test: the draft's steps, each on its own output, over all positions at once, and their gradients.

Step i at position t reads the embedding of x[t+1+i] and the hidden state that step i-1 left at t (step 0: the target's
features at t), attends to the step-0 keys up to t and to its own later keys, and sits at rotary position t+i.

The backward pass is written out, for three reasons: what is cheap to make again (norms, the SwiGLU product) is not
kept, the gradient of each weight is added in float32 by the matrix product that makes it, and a GPU gets one kernel for
all that stands between two products. With x the layer's input, y = x + attention, and (a, b) the halves of gate_up:

    p = silu(a) b     d down = g^T p     dp = g down     da = dp b silu'(a)     db = dp silu(a)
    d gate_up = (da, db)^T norm(y)       dy = g + norm'((da, db) gate_up)       and likewise through o and q, k, v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draft_model.drafts import kernels
from draft_model.drafts.eagle3.attention import Attended, causal_attention
from draft_model.drafts.eagle3.model import Weights
from draft_model.drafts.eagle3.plan import Plan
from draft_model.drafts.kernels import accumulate, rms_norm, rms_norm_backward

KEPT_SHARE = 8  # gate and up of all steps are kept where they take at most an eighth of a GPU's memory


@dataclass
class _Step:
    """What the backward of one step needs."""

    q: Tensor
    scale: Tensor | None
    output_scale: Tensor | None
    given: Attended
    attended: Tensor
    total: Tensor
    middle: Tensor
    middle_scale: Tensor
    both: Tensor | None


class Unroll:
    """One batch's steps; `forward` once, then `backward` once.

    `rotary` has cosines and sines of the longest conversation and the steps, [2, >= S + steps, d].
    """

    def __init__(self, weights: Weights, rotary: Tensor, plan: Plan, backend: str) -> None:
        self.weights, self.rotary, self.plan, self.backend = weights, rotary, plan, backend
        self._eps = weights.config.rms_norm_eps
        self._query = weights.out.shape[1]
        self._steps: list[_Step] = []
        self._normed: list[list[tuple[Tensor, Tensor, Tensor]]] = []

    def forward(self, embeddings: Tensor, features: Tensor, keep: bool) -> Tensor:
        """Runs all steps.

        Args:
            embeddings: the target's embeddings of the batch's tokens without padding, [T, H].
            features: the target's features of these tokens, [T, nH].
            keep: whether a backward will follow.

        Returns:
            The layer's output of each step at the plan's rows, before the final norm, [steps, N, H].
        """
        w, plan, config = self.weights, self.plan, self.weights.config
        self._embeddings, self._features = embeddings, self._norm(features)
        unit, self._embedding_scale = rms_norm(embeddings, w.input_layernorm, self._eps)
        token_part = unit @ w.embedding_qkv.T  # [T, Q + 2K]

        # Step 0: keys and values of every position, from the target's features.
        self._first = (self._features @ w.fc.T).index_select(0, plan.keys)  # [P, H]
        unit, self._first_scale = rms_norm(self._first, w.hidden_norm, self._eps)
        shape = (config.num_key_value_heads, config.head_dim)
        k0, v0 = (unit.new_empty(len(unit), *shape) for _ in range(2))
        window = plan.windows
        kv = unit @ w.hidden_qkv[self._query :].T
        kernels.rotate_heads(
            kv, token_part, plan.keys + 1, self.rotary, window.key_time, 0, self._query, None, k0, v0
        )  # fmt: skip
        self._causal = causal_attention(self.backend, window, k0, v0)

        rows, steps = len(plan.rows), plan.steps
        self._keys, self._values = (unit.new_empty(max(steps - 1, 1), rows, *shape) for _ in range(2))
        hidden = unit.new_empty(steps + 1, rows, config.hidden_size)
        torch.index_select(self._first, 0, plan.rows, out=hidden[0])
        # Else the backward computes gate and up again: a seventh of its products for most memory.
        size = steps * rows * len(w.gate_up) * unit.element_size()
        memory = kernels.memory_of(unit.device)
        keep_mlp = keep and (memory is None or size * KEPT_SHARE <= memory)
        for step in range(steps):
            x, scale, output_scale = hidden[step], None, None
            if step and config.norm_output:
                x, output_scale = rms_norm(x, w.norm, self._eps)
            q = unit.new_empty(rows, config.num_attention_heads, config.head_dim)
            tokens = plan.row_tokens[step]
            if step:
                own, scale = rms_norm(x, w.hidden_norm, self._eps)
                k, v = self._keys[step - 1], self._values[step - 1]
                kernels.rotate_heads(
                    own @ w.hidden_qkv.T, token_part, tokens, self.rotary, window.row_time, step, 0, q, k, v
                )
            else:
                own = unit if plan.everywhere else unit.index_select(0, plan.rows)
                part = own @ w.hidden_qkv[: self._query].T
                kernels.rotate_heads(part, token_part, tokens, self.rotary, window.row_time, 0, 0, q, None, None)
            given = self._causal.forward(q)
            attended, total = kernels.merge(q, given.out, given.lse, given.places, self._keys, self._values, step)
            middle = torch.addmm(x, attended.flatten(1), w.out.T)
            own, middle_scale = rms_norm(middle, w.post_attention_layernorm, self._eps)
            both = own @ w.gate_up.T
            torch.addmm(middle, kernels.swiglu(*both.chunk(2, -1)), w.down.T, out=hidden[step + 1])
            if keep:
                kept = (middle, middle_scale, both if keep_mlp else None)
                self._steps.append(_Step(q, scale, output_scale, given, attended, total, *kept))
        self._hidden = hidden
        return hidden[1:]

    def backward(self, grads: Tensor, sums: Weights, of_features: bool = False) -> Tensor | None:
        """Adds the gradient of every weight but norm and head to `sums`, float32 and arranged as the weights are.

        `grads` is of the outputs of each step, [steps, N, H], and used up.

        Returns:
            The gradient of the features, [T, nH]; None where neither this nor a norm before fc was asked for.
        """
        w, plan, rotary, window = self.weights, self.plan, self.rotary, self.plan.windows
        dkeys, dvalues = (torch.empty_like(x, dtype=torch.float32) for x in (self._keys, self._values))
        token_grad = grads.new_zeros(len(plan.tokens), len(w.hidden_qkv), dtype=torch.float32)
        grad = grads[-1]
        for step in reversed(range(plan.steps)):
            kept = self._steps.pop()
            x = self._hidden[step]
            own, _ = rms_norm(kept.middle, w.post_attention_layernorm, self._eps)
            both = own @ w.gate_up.T if kept.both is None else kept.both
            d_both, product = kernels.swiglu_backward(both, grad @ w.down)
            accumulate(sums.down, grad.T, product)
            accumulate(sums.gate_up, d_both.T, own)
            d_middle, d_norm = rms_norm_backward(
                d_both @ w.gate_up, kept.middle, w.post_attention_layernorm, kept.middle_scale, residual=grad
            )
            del own, both, d_both, product
            sums.post_attention_layernorm.add_(d_norm)
            accumulate(sums.out, d_middle.T, kept.attended.flatten(1))
            d_attended = (d_middle @ w.out).view_as(kept.q)
            given, first = kept.given, step == plan.steps - 1
            dq = self._causal.backward(given, kept.q, d_attended, kept.attended, kept.total)
            merged = (d_attended, kept.attended, kept.total, dq, given.places)
            dq = kernels.merge_backward(kept.q, *merged, self._keys, self._values, dkeys, dvalues, step, first)
            dk, dv = (dkeys[step - 1], dvalues[step - 1]) if step else (None, None)
            dqkv = kernels.rotate_heads_backward(
                dq, dk, dv, rotary, window.row_time, step, plan.row_tokens[step], token_grad, 0, dq.dtype
            )
            if kept.scale is None:
                break
            if kept.output_scale is None:
                d_middle += grads[step - 1]
            else:
                x, _ = rms_norm(x, w.norm, self._eps)
            own, _ = rms_norm(x, w.hidden_norm, self._eps)
            accumulate(sums.hidden_qkv, dqkv.T, own)
            grad, d_norm = rms_norm_backward(dqkv @ w.hidden_qkv, x, w.hidden_norm, kept.scale, residual=d_middle)
            sums.hidden_norm.add_(d_norm)
            if kept.output_scale is not None:
                output = self._hidden[step]
                grad, d_norm = rms_norm_backward(grad, output, w.norm, kept.output_scale, residual=grads[step - 1])
                sums.norm.add_(d_norm)
        d_first = self._backward_of_inputs(dqkv, d_middle, token_grad, sums)
        return self._backward_of_features(d_first, sums) if of_features or w.feature_norms else None

    def _backward_of_inputs(self, dq: Tensor, d_rows: Tensor, token_grad: Tensor, sums: Weights) -> Tensor:
        """What stands before the steps: step-0 keys and values, the tokens' part, fc.

        dq is of the step-0 queries before rotation, [N, Q]; d_rows of the residual stream at the rows, [N, H];
        token_grad of the tokens' part of q, k and v through the rows, float32 [T, Q + 2K].
        """
        w, plan, query = self.weights, self.plan, self._query
        dk, dv = self._causal.key_gradients()
        dkv = kernels.rotate_heads_backward(
            None, dk, dv, self.rotary, plan.windows.key_time, 0, plan.keys + 1, token_grad, query, dq.dtype
        )
        unit, _ = rms_norm(self._first, w.hidden_norm, self._eps)
        own = unit if plan.everywhere else unit.index_select(0, plan.rows)
        accumulate(sums.hidden_qkv[:query], dq.T, own)
        accumulate(sums.hidden_qkv[query:], dkv.T, unit)
        d_unit = dkv @ w.hidden_qkv[query:]
        d_unit.index_add_(0, plan.rows, dq @ w.hidden_qkv[:query])
        d_first, d_norm = rms_norm_backward(d_unit, self._first, w.hidden_norm, self._first_scale)
        sums.hidden_norm.add_(d_norm)
        d_first.index_add_(0, plan.rows, d_rows)
        d_all = d_first.new_zeros(len(plan.tokens), d_first.shape[1]).index_copy_(0, plan.keys, d_first)
        accumulate(sums.fc, d_all.T, self._features)

        unit, _ = rms_norm(self._embeddings, w.input_layernorm, self._eps)
        d_tokens = token_grad.to(unit.dtype)
        accumulate(sums.embedding_qkv, d_tokens.T, unit)
        _, d_norm = rms_norm_backward(
            d_tokens @ w.embedding_qkv, self._embeddings, w.input_layernorm, self._embedding_scale
        )
        sums.input_layernorm.add_(d_norm)
        return d_all

    def _norm(self, features: Tensor) -> Tensor:
        """What fc reads, [T, nH]; keeps what each norm was given."""
        self._normed = []
        for weights in self.weights.feature_norms:
            parts = [part.contiguous() for part in features.chunk(len(weights), -1)]
            normed = [rms_norm(part, weight, self._eps) for part, weight in zip(parts, weights, strict=True)]
            self._normed.append(list(zip(parts, weights, (scale for _, scale in normed), strict=True)))
            features = torch.cat([unit for unit, _ in normed], -1)
        return features

    def _backward_of_features(self, grad: Tensor, sums: Weights) -> Tensor:
        """From the gradient of fc's output [T, H] to the features' [T, nH], through their norms."""
        grad = grad @ self.weights.fc
        for given, totals in zip(reversed(self._normed), reversed(sums.feature_norms), strict=True):
            parts = zip(grad.chunk(len(given), -1), given, strict=True)
            found = [rms_norm_backward(part.contiguous(), *its) for part, its in parts]
            torch._foreach_add_(totals, [d_weight for _, d_weight in found])
            grad = torch.cat([d_part for d_part, _ in found], -1)
        return grad
