"""Training-time test: the draft's steps, each on its own output, over all positions at once.

Step i at position t reads the embedding of x[t+1+i] and the hidden state that step i-1 left at t (step 0: the target's
features at t), attends to the step-0 keys up to t and to its own later keys, and sits at rotary position t+i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draft_model.drafts.eagle3.attention import unroll_attention
from draft_model.drafts.eagle3.batch import Plan
from draft_model.drafts.eagle3.model import Weights, rotate


def unroll(
    weights: Weights, rotary: Tensor, embeddings: Tensor, features: Tensor, plan: Plan, backend: str
) -> list[Tensor]:
    """Runs all steps.

    Args:
        weights: the draft in the compute type.
        rotary: cosines and sines [2, >= S + steps, d] of `Rotary.table`.
        embeddings: the target's embeddings of the batch's tokens, flat [B * T, H].
        features: the target's features of the conversations' tokens without padding, [sum of T_b, 3H].
        plan: positions, of `plan_unroll`.
        backend: of `choose_backend`.

    Returns:
        The layer's output of each step at the plan's rows, before the final norm, [N, H] each.
    """
    token_part = weights.project_embedding(embeddings)  # [B * T, Q + 2K]
    rows, query_size = plan.rows, weights.out.shape[1]
    queries, keys_values = slice(query_size), slice(query_size, None)
    hidden = torch.nn.functional.linear(features, weights.fc)[plan.valid_states]  # [P, H]
    kv = weights.project_hidden(hidden, keys_values) + token_part[plan.valid_tokens, keys_values]
    k, v = kv.unflatten(-1, (2, -1, weights.config.head_dim)).unbind(1)  # [P, kv_heads, d]
    spans = (rows.batch, rows.length)
    k0, v0 = (_scatter(x, plan.valid, spans) for x in (rotate(k, rotary[:, plan.valid % rows.length]), v))
    hidden = hidden[plan.rows_in_valid]
    q = weights.project_hidden(hidden, queries) + token_part[plan.row_tokens[0], queries]
    q = q.unflatten(-1, (-1, weights.config.head_dim))

    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    for step in range(plan.steps):
        table = rotary[:, plan.time + step]
        if step:
            q, k, v = weights.split_heads(weights.project_hidden(hidden) + token_part[plan.row_tokens[step]])
            keys.append(rotate(k, table))
            values.append(v.contiguous())  # a view would keep q and k as well
        attended = unroll_attention(backend, rows, rotate(q, table), k0, v0, keys, values)
        hidden = weights.finish_layer(hidden, attended)
        outputs.append(hidden)
    return outputs


def _scatter(rows: Tensor, index: Tensor, spans: tuple[int, int]) -> Tensor:
    """[P, heads, d] at flat positions -> [B, heads, S, d], zero on padding."""
    dense = rows.new_zeros(spans[0] * spans[1], *rows.shape[1:]).index_copy(0, index, rows)
    return dense.view(*spans, *rows.shape[1:]).transpose(1, 2)
