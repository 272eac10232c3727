"""A block draft: K tokens in one pass of a few layers like Qwen3's, each reading the target's features as context.

    c = hidden_norm(fc(features))           of every token that the target has read, in every layer the same
    x = embedding of (anchor, mask, ..., mask), the token after those and K - 1 (DFlash: K) to be filled in
    q, k, v of input_layernorm(x), k and v of c as well; q_norm and k_norm per head; rotary positions
    x = x + attention(q; k and v of c before the anchor, and of the whole block);  x = x + SwiGLU(...)
    u = norm(x);  logits of proposal j = head u_j + w2 w1[token before it];  confidence = sigmoid(proj (u_j, w1[...]))

Embedding and head are the target's. The Markov term w2 w1[...] lets a proposal see the one before it, which the pass
itself cannot; it and the confidence are DSpark's, DFlash has neither. Parameters carry the checkpoint's names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from draft_model.drafts.dspark.config import BlockConfig
from draft_model.drafts.layers import Attention, SwiGLU, cast, linear, rotary_table, rotate, start

if TYPE_CHECKING:
    from draft_model.target.model import Target

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""From the blocks' q [N, S, heads, d], k and v [N, S, kv_heads, d] and the context's k and v to [N, S, heads, d]."""


START_SPREAD = 2.0  # standard deviation of a fresh draft's logits; 6, as of the demo's target, learns more slowly


class _Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), cast(self.weight, x.dtype), self.eps)


class _Attention(Attention):
    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config, config.hidden_size)
        self.head_dim = config.head_dim
        self.q_norm, self.k_norm = (_Norm(self.head_dim, config.rms_norm_eps) for _ in range(2))

    def queries(self, x: Tensor, table: Tensor) -> Tensor:
        """[N, H] -> rotated queries [N, heads, d]; table: cosines and sines of the rows, [2, N, d]."""
        return rotate(self.q_norm(linear(x, self.q_proj).unflatten(-1, (-1, self.head_dim))), table)

    def keys_values(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """[N, H] -> rotated keys and values, [N, kv_heads, d] each."""
        k, v = (linear(x, proj).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        return rotate(self.k_norm(k), table), v


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(config), SwiGLU(config)
        self.input_layernorm, self.post_attention_layernorm = (
            _Norm(config.hidden_size, config.rms_norm_eps) for _ in range(2)
        )

    def forward(self, x: Tensor, table: Tensor, context: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """X [N, S, H] with the rows' table [2, N S, d], and keys and values of the context: [N, S, H]."""
        blocks = x.shape[:2]
        rows = self.input_layernorm(x).flatten(0, 1)
        parts = (self.self_attn.queries(rows, table), *self.self_attn.keys_values(rows, table))
        q, k, v = (part.unflatten(0, blocks) for part in parts)
        x = x + linear(attend(q, k, v, *context).flatten(2), self.self_attn.o_proj)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class BlockDraft(nn.Module):
    """The draft's float32 parameters. It knows all target tokens: t2d is true everywhere, d2t zero."""

    t2d: Tensor
    d2t: Tensor

    def __init__(self, config: BlockConfig, t2d: Tensor, d2t: Tensor) -> None:
        super().__init__()
        self.config = config
        hidden, rank = config.hidden_size, config.markov_rank
        self.fc = nn.Linear(len(config.aux_layers) * hidden, hidden, bias=False)
        self.hidden_norm, self.norm = (_Norm(hidden, config.rms_norm_eps) for _ in range(2))
        self.layers: Any = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        if rank:
            w1, w2 = nn.Embedding(config.vocab_size, rank), nn.Linear(rank, config.vocab_size, bias=False)
            self.markov_head: Any = nn.ModuleDict({"markov_w1": w1, "markov_w2": w2})
        if config.enable_confidence_head:
            self.confidence_head: Any = nn.ModuleDict({"proj": nn.Linear(hidden + rank, 1)})
        self.register_buffer("t2d", t2d, persistent=False)
        self.register_buffer("d2t", d2t, persistent=False)

    def initialise(self, seed: int, target: Target) -> None:
        """Random matrices, and over them what the target already knows, which short runs profit from most.

        Where the shapes are alike, every layer starts as the target's last one; `fc` passes the highest feature
        through, and the final norm is the target's, scaled down to logits that spread by START_SPREAD. The confidence
        head starts at one half, the Markov head without effect. Its embeddings are random projections of the target's,
        so that what is learnt of a token holds for its like too; of size 1, for the smaller they are, the longer w2
        takes to have an effect.
        """
        with torch.no_grad():
            start(self, seed, target)
            # Logits of a random state spread by sqrt(sum_h (norm_h head_vh)^2): at the target's scale a draft that
            # knows nothing is sure of it, by 60 nats.
            columns = torch.linalg.vector_norm(target.head, dim=0, dtype=torch.float32)
            spread = (target.norm * columns).norm() / len(target.head) ** 0.5
            self.norm.weight.mul_((START_SPREAD / spread).clamp(max=1.0))
            for layer in self.layers:
                for name, parameter in layer.named_parameters():
                    source = target.last_layer.get(name)
                    if source is not None and source.shape == parameter.shape:
                        parameter.copy_(source)
            if rank := self.config.markov_rank:
                basis = torch.randn(self.config.hidden_size, rank, generator=torch.Generator().manual_seed(seed))
                codes = target.embedding.float() @ basis.to(target.embedding.device)
                self.markov_head.markov_w1.weight.copy_(codes / codes.square().mean().sqrt())
                self.markov_head.markov_w2.weight.zero_()
            if self.config.enable_confidence_head:
                self.confidence_head.proj.weight.zero_()
                self.confidence_head.proj.bias.zero_()

    def context(self, features: Tensor) -> Tensor:
        """The target's features as every layer's keys and values read them: [T, n H] -> [T, H]."""
        return self.hidden_norm(linear(features, self.fc))  # type: ignore[no-any-return]


class BlockProposer:
    """Proposes tokens for the rows of a batch; decoding may reach `length` positions, proposals included."""

    def __init__(self, draft: BlockDraft, target: Target, length: int) -> None:
        self.draft = draft
        self.rotary = rotary_table(draft.config, target.device, length + 1, torch.float32)
        self.embedding, self.head = target.embedding.float(), target.head.float()
        shape = draft.config
        # Keys and values of the target's tokens in every layer, [L, 2, B, C, kv_heads, d].
        self.cache = torch.empty(
            shape.num_hidden_layers, 2, 0, 0, shape.num_key_value_heads, shape.head_dim, device=target.device
        )

    def propose(
        self, features: Tensor, tokens: Tensor, positions: Tensor, visible: Tensor, ends: Tensor, count: int
    ) -> Tensor:
        """Reads new columns, then fills in a block behind each row's last accepted one; see `base.Proposer`."""
        draft, shape = self.draft, self.draft.config
        rows, size = torch.arange(len(ends), device=ends.device), count + shape.first
        context = draft.context(features.float()).flatten(0, 1)
        behind = self.rotary[:, positions.flatten()]
        new = [torch.stack(layer.self_attn.keys_values(context, behind)) for layer in draft.layers]
        columns = torch.stack(new).unflatten(2, tokens.shape)  # [L, 2, B, Q, kv_heads, d]
        self.cache = torch.cat((self.cache, columns), 3) if self.cache.shape[3] else columns
        anchors = tokens[rows, ends]
        ids = torch.full((len(rows), size), shape.mask_token_id, device=ends.device)
        ids[:, 0] = anchors
        at = positions[rows, ends].unsqueeze(1) + 1 + torch.arange(size, device=ends.device)
        table = self.rotary[:, at.flatten()]
        mask = torch.cat((visible, visible.new_ones(len(rows), size)), 1)[:, None, None]  # [B, 1, 1, C + Q + S]

        def attend(q: Tensor, k: Tensor, v: Tensor, seen_k: Tensor, seen_v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, torch.cat((seen_k, k), 1), torch.cat((seen_v, v), 1)))
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

        x = functional.embedding(ids, self.embedding)
        for layer, (keys, values) in zip(draft.layers, self.cache, strict=True):
            x = layer(x, table, (keys, values), attend)
        logits: Tensor = draft.norm(x)[:, shape.first :] @ self.head.T  # [B, K, V]
        if not shape.markov_rank:
            return logits.argmax(-1)
        proposed, heads = [anchors], draft.markov_head
        for step in range(count):
            bias = heads.markov_w1.weight[proposed[-1]] @ heads.markov_w2.weight.T
            proposed.append((logits[:, step] + bias).argmax(-1))
        return torch.stack(proposed[1:], 1)

    def select(self, rows: Tensor) -> None:
        """Keeps some rows of the batch, int64 [B']."""
        self.cache = self.cache[:, :, rows]
