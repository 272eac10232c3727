"""EAGLE-3's training step, naive: one conversation, step and position at a time, dense masks, float64.

Written from the description of the method, not from the code it checks, and sharing nothing with it. At step
i the position t reads x[t+1+i], sits at rotary position t+i, is taught by the target at t+1+i and speaks of
x[t+2+i]; so a conversation of T tokens has T-2-i positions at step i. Weights come under their checkpoint
names, gradients from autograd.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conversation:
    """T tokens, what the target computed over them, and where its tokens are to be learnt."""

    tokens: Tensor  # ids [T]
    features: Tensor  # [T, 3H]
    target_logits: Tensor  # over the whole target vocabulary, [T, V]
    predicted: Tensor  # bool [T]; True at p where token p+1 is to be learnt


class Sums:
    """Per step; `total` is a differentiable sum, the others are counts and sums."""

    def __init__(self, steps: int) -> None:
        self.total = torch.zeros((), dtype=torch.float64)
        self.loss, self.supervised, self.agree, self.overlap = ([0] * steps for _ in range(4))
        self.candidates, self.reached, self.accepted = ([0] * steps for _ in range(3))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, positions: list[int], theta: float) -> Tensor:
    """Turns each pair (x[k], x[k + d/2]) of [n, heads, d] by position * theta^(-2k/d)."""
    half = x.shape[-1] // 2
    rows = []
    for row, position in zip(x, positions, strict=True):
        angle = torch.tensor([position * theta ** (-k / half) for k in range(half)], dtype=x.dtype)
        a, b = row[:, :half], row[:, half:]
        rows.append(torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1))
    return torch.stack(rows)


def dense_attention(q: Tensor, blocks_k: list[Tensor], blocks_v: list[Tensor]) -> Tensor:
    """One step's attention under the full boolean mask of queries x all steps' keys.

    Args:
        q: queries of positions 0..n-1, [n, heads, d].
        blocks_k: step m's keys of positions 0..n_m - 1, n_m >= n, [n_m, kv_heads, d].
        blocks_v: likewise.
    """
    count, heads, size = q.shape
    own = [torch.eye(count, len(block), dtype=torch.bool) for block in blocks_k[1:]]
    mask = torch.cat([torch.ones(count, len(blocks_k[0]), dtype=torch.bool).tril(), *own], 1)
    k, v = torch.cat(blocks_k), torch.cat(blocks_v)
    group = heads // k.shape[1]
    outputs = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(size)
        scores = scores.masked_fill(~mask, -math.inf)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        outputs.append(weights / weights.sum(-1, keepdim=True) @ v[:, head // group])
    return torch.stack(outputs, 1)


def layer_outputs(
    weights: Mapping[str, Tensor], config: Any, conversation: Conversation, embedding: Tensor, steps: int
) -> list[Tensor]:
    """The layer's output of each step, before the final norm: [T-2-i, H]; fewer steps where T is short."""
    layer = {name.removeprefix("midlayer."): w for name, w in weights.items() if name.startswith("midlayer.")}
    length, eps, theta = len(conversation.tokens), config.rms_norm_eps, config.rope_parameters["rope_theta"]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    features = conversation.features[: max(length - 2, 0)]
    if "input_norm.weight" in weights:
        features = rms_norm(features, weights["input_norm.weight"], eps)
    if own := [w for name, w in weights.items() if name.startswith("fc_norm.")]:
        size = features.shape[1] // len(own)
        parts = [features[:, place * size : (place + 1) * size] for place in range(len(own))]
        features = torch.cat([rms_norm(part, w, eps) for part, w in zip(parts, own, strict=True)], -1)
    hidden = features @ weights["fc.weight"].T
    for step in range(min(steps, max(length - 2, 0))):
        count = length - 2 - step
        hidden = hidden[:count]
        if step and config.norm_output:
            hidden = rms_norm(hidden, weights["norm.weight"], eps)
        token = embedding[conversation.tokens[1 + step : 1 + step + count]]
        x = torch.cat(
            (
                rms_norm(token, layer["input_layernorm.weight"], eps),
                rms_norm(hidden, layer["hidden_norm.weight"], eps),
            ),
            -1,
        )
        q = (x @ layer["self_attn.q_proj.weight"].T).view(count, config.num_attention_heads, config.head_dim)
        k = (x @ layer["self_attn.k_proj.weight"].T).view(count, config.num_key_value_heads, config.head_dim)
        v = (x @ layer["self_attn.v_proj.weight"].T).view(count, config.num_key_value_heads, config.head_dim)
        positions = [t + step for t in range(count)]
        keys.append(rope(k, positions, theta))
        values.append(v)
        attended = dense_attention(rope(q, positions, theta), keys, values).reshape(count, -1)
        hidden = hidden + attended @ layer["self_attn.o_proj.weight"].T
        normed = rms_norm(hidden, layer["post_attention_layernorm.weight"], eps)
        gate, up = normed @ layer["mlp.gate_proj.weight"].T, normed @ layer["mlp.up_proj.weight"].T
        hidden = hidden + (gate / (1 + torch.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
        outputs.append(hidden)
    return outputs


def training_step(
    weights: Mapping[str, Tensor], config: Any, conversations: list[Conversation], embedding: Tensor,
    target_ids: Tensor, steps: int, kind: str = "kl",
) -> Sums:  # fmt: skip
    """The un-normalised loss of a batch, sum over steps of 0.8^i loss_i, and all that is counted on the way.

    Weights, by checkpoint name, get gradients through `Sums.total`. The loss is soft cross-entropy (kl), 1 - alpha (tv)
    or both by exp(-3 alpha), held constant (lk).
    """
    sums = Sums(steps)
    known = target_ids.tolist()
    for conversation in conversations:
        candidate: dict[tuple[int, int], bool] = {}  # (position, step): is the draft's top token the target's?
        for step, output in enumerate(layer_outputs(weights, config, conversation, embedding, steps)):
            logits = rms_norm(output, weights["norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T
            for t, row in enumerate(logits):
                teacher_at = t + 1 + step
                if not conversation.predicted[teacher_at]:
                    continue
                teacher = conversation.target_logits[teacher_at]
                top = int(teacher.argmax())
                candidate[t, step] = False
                if top not in known:
                    continue
                log_q = row - row.logsumexp(0)
                p = torch.softmax(teacher[target_ids], 0)
                loss, alpha = -(p * log_q).sum(), torch.minimum(p, log_q.exp()).sum()
                share = {"kl": 1.0, "tv": 0.0, "lk": torch.exp(-3 * alpha.detach())}[kind]
                loss = share * loss + (1 - share) * (1 - alpha)
                sums.total = sums.total + 0.8**step * loss
                sums.loss[step] += loss.item()
                sums.supervised[step] += 1
                sums.overlap[step] += alpha.item()
                candidate[t, step] = known[int(row.argmax())] == top
                sums.agree[step] += candidate[t, step]
        for t, step in candidate:
            sums.candidates[step] += 1
            before = [candidate.get((t, earlier), False) for earlier in range(step)]
            if all(before):
                sums.reached[step] += 1
                sums.accepted[step] += candidate[t, step]
    return sums
