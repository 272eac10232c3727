"""The draft: one Llama-like decoder layer that reads the target's features and the next token's embedding.

    h = fc(features)                     at the first step; later the layer's own output
    x = cat(input_layernorm(e), hidden_norm(h))
    h = h + attention(x);  h = h + SwiGLU(post_attention_layernorm(h));  logits = lm_head(norm(h))

EAGLE-3.1 adds by switches of the configuration: `input_norm` of all features together, `fc_norm` of each of the n, and
`norm_output`, by which the next step reads norm(h) instead of h.

Parameters carry the names of the checkpoint that engines load. `Weights` is the same model as the maths uses it: in the
compute type, and with q, k, v cut into the half that multiplies the embedding and the half that multiplies h. The
embedding's half depends on the token alone, so the unroll computes it once and shifts it, and each later step costs
half the projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from draft_model.drafts.batch import collate
from draft_model.drafts.eagle3.config import DraftConfig
from draft_model.drafts.layers import Attention, SwiGLU, copy_of, rotary_table, rotate, start

if TYPE_CHECKING:
    from draft_model.target.model import Target


_READS_BOTH = frozenset(f"self_attn.{name}_proj.weight" for name in "qkv")


@dataclass(frozen=True)
class Weights:
    """The draft's weights in the compute type. H: hidden, Q: heads * head_dim, K: kv_heads * head_dim, I: SwiGLU."""

    config: DraftConfig
    fc: Tensor  # [H, nH]
    embedding_qkv: Tensor  # the embedding's half of the q, k and v projections, [Q + 2K, H]
    hidden_qkv: Tensor  # the other half, [Q + 2K, H]
    out: Tensor  # [H, Q]
    gate_up: Tensor  # [2I, H]
    down: Tensor  # [H, I]
    input_layernorm: Tensor  # [H], of the embedding
    hidden_norm: Tensor  # [H], of h
    post_attention_layernorm: Tensor  # [H]
    norm: Tensor  # [H], before the head
    head: Tensor  # [D, H]
    # before fc, one after the other: of all features [nH], of each of the n [H], or none
    feature_norms: list[tuple[Tensor, ...]]


class _Layer(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, 2 * config.hidden_size)
        self.mlp = SwiGLU(config)
        self.hidden_norm, self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(config.hidden_size) for _ in range(3)
        )


class Eagle3Draft(nn.Module):
    """The draft's float32 parameters and its vocabulary.

    t2d says which target tokens it knows, bool [V]; d2t is target_id - draft_id of each draft token, int64 [D].
    """

    t2d: Tensor
    d2t: Tensor

    def __init__(self, config: DraftConfig, t2d: Tensor, d2t: Tensor) -> None:
        super().__init__()
        self.config = config
        features = len(config.aux_layers)
        self.fc = nn.Linear(features * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = _Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        if config.norm_before_fc:
            self.input_norm = nn.RMSNorm(features * config.hidden_size)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(config.hidden_size) for _ in range(features))
        self.register_buffer("t2d", t2d)
        self.register_buffer("d2t", d2t)

    @property
    def target_ids(self) -> Tensor:
        """The target's token id of each draft token, int64 [D]."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def initialise(self, seed: int, target: Target) -> None:
        """Random matrices, and over them what the target already knows, which short runs profit from most.

        Head and final norm are the target's. `fc` passes the highest feature through, so that the residual stream
        starts in the space that the head reads. The layer starts as the target's last one wherever the shapes are
        alike; the embedding's half of q, k and v, which no target has, starts random.
        """
        hidden = self.config.hidden_size
        with torch.no_grad():
            start(self, seed, target)
            self.lm_head.weight.copy_(target.head[self.target_ids.to(target.head.device)])
            known = target.last_layer
            for name, parameter in self.midlayer.named_parameters():
                part = parameter[:, hidden:] if name in _READS_BOTH else parameter
                source = known.get("input_layernorm.weight" if name == "hidden_norm.weight" else name)
                if source is not None and source.shape == part.shape and name != "input_layernorm.weight":
                    part.copy_(source)
            if self.config.norm_output or self.config.fc_norm or self.config.norm_before_fc:
                self._start_normed(target)

    def _start_normed(self, target: Target) -> None:
        """Has norms give rows of the size that the target's have, which is what the layer's weights are made for.

        The final norm's own weight moves into the head where the next step reads what it gives. Shrinking the layer's
        weights instead would be the same draft, but not for Muon, which moves every matrix by as much.
        """
        hidden = self.config.hidden_size
        tokens = torch.linspace(0, self.config.vocab_size - 1, 64).long()
        rows = target.states(collate([(tokens, tokens >= 0)]))[0][:, -2 * hidden : -hidden].float()
        size = float(rows.square().mean(-1).sqrt().median())
        if self.config.norm_output:
            self.lm_head.weight.mul_(self.norm.weight / size)
            self.norm.weight.fill_(size)
        for name, parameter in self.named_parameters():
            if name.startswith("fc_norm." if self.config.fc_norm else "input_norm."):  # the last one before fc
                parameter.fill_(size)

    def weights(self, dtype: torch.dtype) -> Weights:
        """The weights in the compute type."""
        return self._arrange([copy_of(parameter, dtype) for parameter in self.parameters()], dtype)

    def gradients(self) -> Weights:
        """Views of the parameters' float32 gradients, arranged as the weights are; adding to them changes `.grad`.

        The gradients lie one after the other in one piece of memory, so that q, k, v and gate, up are one matrix each.
        """
        parameters = list(self.parameters())
        if not _one_piece([parameter.grad for parameter in parameters]):
            flat = torch.zeros(sum(map(torch.numel, parameters)), device=parameters[0].device)
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                part = part.view_as(parameter)
                parameter.grad = part if parameter.grad is None else part.copy_(parameter.grad)
        return self._arrange([p.grad for p in parameters if p.grad is not None], torch.float32)

    def _arrange(self, tensors: list[Tensor], dtype: torch.dtype) -> Weights:
        """One tensor for each parameter, in their order, as `Weights`; q, k, v and gate, up joined."""
        fc, q, k, v, out, gate, up, down, hidden_norm, input_layernorm, post, norm, head, *own = tensors
        qkv, gate_up = _joined([q, k, v], dtype), _joined([gate, up], dtype)
        hidden = self.config.hidden_size
        fc, out, down, hidden_norm, input_layernorm, post, norm, head, *own = (
            x.to(dtype) for x in (fc, out, down, hidden_norm, input_layernorm, post, norm, head, *own)
        )
        norms = [tuple(own[:1]), tuple(own[1:])] if self.config.norm_before_fc else [tuple(own)]
        return Weights(
            config=self.config, fc=fc, embedding_qkv=qkv[:, :hidden], hidden_qkv=qkv[:, hidden:], out=out,
            gate_up=gate_up, down=down, input_layernorm=input_layernorm, hidden_norm=hidden_norm,
            post_attention_layernorm=post, norm=norm, head=head, feature_norms=[its for its in norms if its],
        )  # fmt: skip


class ChainProposer:
    """Proposes tokens for the rows of a batch; decoding may reach `length` positions, proposals included."""

    def __init__(self, draft: Eagle3Draft, target: Target, length: int) -> None:
        self.weights = draft.weights(torch.float32)
        self.head = draft.lm_head.weight
        self.target_ids = draft.target_ids
        self.rotary = rotary_table(draft.config, target.device, length, torch.float32)
        self.embedding = target.embedding.float()
        heads, size = draft.config.num_key_value_heads, draft.config.head_dim
        self.keys = self.values = torch.empty(0, heads, 0, size, device=target.device)  # [B, kv_heads, C, d]

    def propose(
        self, features: Tensor, tokens: Tensor, positions: Tensor, visible: Tensor, ends: Tensor, count: int
    ) -> Tensor:
        """Reads new columns, then continues from each row's last one on the draft's own output; see `base.Proposer`."""
        rows = torch.arange(len(ends), device=ends.device)
        columns, width = visible.shape[1], tokens.shape[1]
        # Causal among the new columns; a masked column still sees itself, so that no softmax is empty.
        order = torch.ones(width, columns, dtype=torch.bool, device=ends.device).tril(columns - width)
        own = torch.eye(width, columns, dtype=torch.bool, device=ends.device).roll(columns - width, 1)
        mask = (visible.unsqueeze(1) & order) | own  # [B, Q, C + Q]
        features = features.float()
        for weights in self.weights.feature_norms:
            parts = zip(features.chunk(len(weights), -1), weights, strict=True)
            features = torch.cat([self._norm(part, weight) for part, weight in parts], -1)
        hidden = self._step(functional.linear(features, self.weights.fc), tokens, positions, mask)
        hidden, best = self._read(hidden[rows, ends].unsqueeze(1))
        proposed, position = [best], positions[rows, ends].unsqueeze(1)
        for depth in range(1, count):
            mask = torch.cat((visible, visible.new_ones(len(rows), depth)), 1).unsqueeze(1)
            hidden, best = self._read(self._step(hidden, proposed[-1], position + depth, mask))
            proposed.append(best)
        self.keys, self.values = self.keys[:, :, :columns], self.values[:, :, :columns]
        return torch.cat(proposed, 1)

    def select(self, rows: Tensor) -> None:
        """Keeps some rows of the batch, int64 [B']."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.weights.config.rms_norm_eps)

    def _read(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the next step reads, and the favourite token of the layer's output [B, 1, H]."""
        normed = self._norm(hidden, self.weights.norm)
        best = functional.linear(normed, self.head).argmax(-1)
        return normed if self.weights.config.norm_output else hidden, self.target_ids[best]

    def _step(self, hidden: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """One pass of the layer over Q columns, whose keys and values stay in the cache: [B, Q, H] -> [B, Q, H]."""
        w, shape, config = self.weights, tokens.shape, self.weights.config
        hidden = hidden.flatten(0, 1)
        embedded = self._norm(functional.embedding(tokens, self.embedding).flatten(0, 1), w.input_layernorm)
        normed = self._norm(hidden, w.hidden_norm)
        qkv = functional.linear(embedded, w.embedding_qkv) + functional.linear(normed, w.hidden_qkv)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        q, k, v = qkv.unflatten(-1, (-1, config.head_dim)).split((heads, kv_heads, kv_heads), -2)  # [BQ, heads, d]
        table = self.rotary[:, positions.flatten()]
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (rotate(q, table), rotate(k, table), v))
        if self.keys.shape[2]:
            k, v = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
        self.keys, self.values = k, v
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1), enable_gqa=True)
        hidden = hidden + functional.linear(attended.transpose(1, 2).flatten(0, 1).flatten(-2), w.out)
        gate_up = functional.linear(self._norm(hidden, w.post_attention_layernorm), w.gate_up)
        gate, up = gate_up.chunk(2, -1)
        following: Tensor = (hidden + functional.linear(functional.silu(gate) * up, w.down)).unflatten(0, shape)
        return following


def _one_piece(tensors: list[Tensor | None]) -> bool:
    """Whether tensors lie one after the other in one storage."""
    first = tensors[0]
    if first is None:
        return False
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for tensor in tensors:
        if tensor is None or tensor.untyped_storage().data_ptr() != storage or tensor.storage_offset() != offset:
            return False
        offset += tensor.numel()
    return True


def _joined(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Matrices one above the other: a view where they lie so already, in that type, else a copy."""
    first, rows = tensors[0], sum(len(tensor) for tensor in tensors)
    if first.dtype == dtype and _one_piece([*tensors]):
        return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    joined = first.new_empty(rows, first.shape[1], dtype=dtype)
    for part, tensor in zip(joined.split([len(tensor) for tensor in tensors]), tensors, strict=True):
        part.copy_(tensor)
    return joined
