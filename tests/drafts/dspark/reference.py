"""A block draft's training step by its definition, in float64: one block, one sequence, one softmax at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from drafts.eagle3.reference import rms_norm as norm
from drafts.eagle3.reference import rope


def hidden_states(w: dict[str, Tensor], config, features: Tensor, embedding: Tensor, anchor: int, token: int) -> Tensor:
    """One block's final hidden states [S, H], of a conversation's features [T, n H]: those before the anchor count."""
    eps, theta, size = config.rms_norm_eps, config.rope_parameters["rope_theta"], config.block_size
    context = norm(features[:anchor] @ w["fc.weight"].T, w["hidden_norm.weight"], eps)
    x = embedding[[token] + [config.mask_token_id] * (size - 1)]
    positions = list(range(anchor + size))
    for index in range(config.num_hidden_layers):
        p = {name.removeprefix(f"layers.{index}."): tensor for name, tensor in w.items()}
        own = norm(x, p["input_layernorm.weight"], eps)
        rows = torch.cat((context, own))
        q, k, v = (
            (source @ p[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, config.head_dim))
            for name, source in (("q", own), ("k", rows), ("v", rows))
        )
        q = rope(norm(q, p["self_attn.q_norm.weight"], eps), positions[anchor:], theta)
        k = rope(norm(k, p["self_attn.k_norm.weight"], eps), positions, theta)
        group = config.num_attention_heads // config.num_key_value_heads
        heads = [
            torch.softmax(q[:, head] @ k[:, head // group].T / math.sqrt(config.head_dim), -1) @ v[:, head // group]
            for head in range(config.num_attention_heads)
        ]
        x = x + torch.cat(heads, -1) @ p["self_attn.o_proj.weight"].T
        rows = norm(x, p["post_attention_layernorm.weight"], eps)
        inner = functional.silu(rows @ p["mlp.gate_proj.weight"].T) * (rows @ p["mlp.up_proj.weight"].T)
        x = x + inner @ p["mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"], eps)


def distance(kind: str, p: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """A proposal's loss and acceptance probability, from p [V] and the draft's logits z [V]."""
    log_q = torch.log_softmax(z, -1)
    overlap = torch.minimum(p, log_q.exp()).sum()
    hard, soft = -log_q[p.argmax()], -(p * log_q).sum()
    far = torch.exp(-3 * overlap.detach())
    losses = {"tv": 0.1 * hard + 0.9 * (1 - overlap), "kl": soft, "lk": far * soft + (1 - far) * (1 - overlap)}
    return losses[kind], overlap


def block_loss(
    w: dict[str, Tensor], config, kind: str, tokens: Tensor, features: Tensor, logits: Tensor, learnt: list[bool],
    embedding: Tensor, head: Tensor, anchor: int,
) -> tuple[Tensor, list[tuple[float, bool, float]]]:  # fmt: skip
    """One block's weighted loss; of each learnt proposal its loss, whether it agrees, and its overlap.

    Args:
        tokens: of the conversation, [T].
        features: the target's, [T, n H].
        logits: the target's, [T, V].
        learnt: for each token whether its successor is supervised.
    """
    hidden = hidden_states(w, config, features, embedding, anchor, int(tokens[anchor]))
    total, told, losses, confident = torch.zeros((), dtype=torch.float64), [], [], []
    for number in range(config.proposals):
        teacher = anchor + number
        if teacher >= len(tokens) or not learnt[teacher]:
            break
        u, p = hidden[number + config.first], torch.softmax(logits[teacher], -1)
        z = head @ u
        if config.markov_rank:
            e = w["markov_head.markov_w1.weight"][tokens[teacher]]
            z = z + w["markov_head.markov_w2.weight"] @ e
        loss, overlap = distance(kind, p, z)
        told.append((float(loss.detach()), bool(z.argmax() == p.argmax()), float(overlap.detach())))
        losses.append(loss)
        confident.append(float(torch.softmax(z.detach(), -1)[p.argmax()]))
        if config.enable_confidence_head:
            c = w["confidence_head.proj.weight"][0] @ torch.cat((u, e)) + w["confidence_head.proj.bias"][0]
            target = overlap.detach()
            error = -target * functional.logsigmoid(c) - (1 - target) * functional.logsigmoid(-c)
            total = total + math.exp(-number / config.loss_decay_gamma) * error
    for number, loss in enumerate(losses):
        total = total + weight(config, confident, number) * loss
    return total, told


def weight(config, confident: list[float], number: int) -> float:
    """What a proposal's loss counts: D-PACE's expected gain, or the fixed decay."""
    if not config.dpace_alpha:
        return math.exp(-number / config.loss_decay_gamma)
    smooth = [(1 - config.dpace_alpha) * q + config.dpace_alpha for q in confident]
    return sum(math.prod(smooth[: last + 1]) for last in range(number, len(smooth)))
