"""Chain speculative decoding, greedy: the draft proposes K tokens, the target checks them in one forward pass.

Each round the target reads the last token it chose and the K proposals, keeps the proposals that are its own choices,
and adds one token of its own: one forward pass for 1 + accepted tokens, and every token is the target's own choice.

Rows of a batch accept different numbers of tokens. Caches therefore grow by whole columns for all rows, and a column
that a row rejected is masked for that row; trailing columns that no row kept are cut. With a batch of one nothing is
ever masked, which is what targets with sliding-window layers need (they count columns, not positions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from draft_model.eagle3.model import Eagle3Draft, Rotary, rotate
from draft_model.eagle3.target import Target


@dataclass
class Reply:
    """What was decoded for one prompt.

    Attributes:
        tokens: new tokens, the end-of-sequence token included.
        drafted: for each of them, whether the draft proposed it.
        accepted: proposals that each round kept.
    """

    tokens: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


@dataclass
class _Columns:
    """Cached columns that each row may see, bool [B, C]; all columns are in the order of time."""

    visible: Tensor

    def append(self, kept: Tensor) -> None:
        self.visible = torch.cat((self.visible, kept), 1)


class _DraftCache:
    """Keys and values of the draft's layer, [B, kv_heads, C, d], at the target's features (step 0)."""

    def __init__(self, draft: Eagle3Draft, target: Target, length: int) -> None:
        self.weights = draft.weights(torch.float32)
        self.head = draft.lm_head.weight
        self.target_ids = draft.target_ids
        self.rotary = Rotary(draft.config, target.device).table(length, torch.float32)
        self.embedding = target.embedding
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def step(self, hidden: Tensor, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """One pass of the layer over new columns, which stay in the cache.

        Args:
            hidden: h of each column, [B, Q, H].
            tokens: the token that each column reads, int64 [B, Q].
            positions: rotary positions, int64 [B, Q].
            visible: which columns, old and new, a row may see, bool [B, C + Q].

        Returns:
            The layer's output, [B, Q, H].
        """
        w, (batch, width) = self.weights, tokens.shape
        normed = w.rms_norm(hidden, w.hidden_norm)
        embedded = functional.embedding(tokens, self.embedding)
        qkv = functional.linear(normed, w.hidden_qkv) + w.project_embedding(embedded)
        q, k, v = (x.unflatten(0, (batch, width)) for x in w.split_heads(qkv.flatten(0, 1)))
        table = self.rotary[:, positions.flatten()]
        q, k = (rotate(x.flatten(0, 1), table).unflatten(0, (batch, width)).transpose(1, 2) for x in (q, k))
        v = v.transpose(1, 2)
        self.keys = k if self.keys is None else torch.cat((self.keys, k), 2)
        self.values = v if self.values is None else torch.cat((self.values, v), 2)
        causal = torch.ones(width, visible.shape[1], dtype=torch.bool, device=q.device).tril(visible.shape[1] - width)
        own = torch.eye(width, visible.shape[1], dtype=torch.bool, device=q.device).roll(visible.shape[1] - width, 1)
        mask = (visible.unsqueeze(1) & causal) | own  # a masked row sees itself, so that no softmax is empty
        attended = functional.scaled_dot_product_attention(
            q, self.keys, self.values, attn_mask=mask.unsqueeze(1), enable_gqa=True
        )
        return w.finish_layer(hidden, attended.transpose(1, 2))

    def propose(self, hidden: Tensor) -> Tensor:
        """The draft's favourite token after each h [B, H], as the target's id, int64 [B]."""
        logits = functional.linear(self.weights.rms_norm(hidden, self.weights.norm), self.head)
        return self.target_ids[logits.argmax(-1)]

    def cut(self, columns: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[:, :, :columns], self.values[:, :, :columns]

    def select(self, rows: Tensor) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


class SpeculativeDecoder:
    """Decodes batches of prompts.

    Args:
        target: in float32.
        draft: its draft.
        proposals: K, tokens that the draft proposes per round.
        end_tokens: ids that end a reply.
    """

    def __init__(self, target: Target, draft: Eagle3Draft, proposals: int, end_tokens: Sequence[int]) -> None:
        self.target, self.draft, self.proposals, self.end = target, draft, proposals, frozenset(end_tokens)

    @torch.no_grad()
    def decode(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Reply]:
        """Decodes one batch.

        Args:
            prompts: token ids, at least two each.
            max_new_tokens: longest reply.

        Returns:
            One reply per prompt, in their order.
        """
        batch = _Batch(self, prompts, max_new_tokens)
        batch.prefill()
        while batch.rows:
            batch.round()
        return batch.replies


class _Batch:
    """The rows still being decoded. `last` is each row's newest token, which the target has not read yet."""

    def __init__(self, decoder: SpeculativeDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        from transformers import DynamicCache

        self.decoder, self.target, self.proposals = decoder, decoder.target, decoder.proposals
        self.limit = max_new_tokens
        self.replies = [Reply() for _ in prompts]
        self.rows = list(range(len(prompts)))
        device = self.target.device
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = int(self.lengths.max())
        self.prompts = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            self.prompts[row, : len(prompt)] = torch.tensor(list(prompt), device=device)
        self.cache = DynamicCache()
        self.columns = _Columns(torch.arange(width, device=device) < self.lengths.unsqueeze(1))
        self.draft = _DraftCache(decoder.draft, self.target, width + max_new_tokens + 2 * self.proposals + 2)
        self.last = torch.empty(0)
        self.proposed = torch.empty(0)

    def _read(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """The target over new columns: hidden states after the final norm [B, Q, H] and features [B, Q, 3H]."""
        output = self.target.decoder(
            input_ids=tokens,
            attention_mask=visible.long(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state, self.target.features()

    def prefill(self) -> None:
        """Reads the prompts; the target chooses each row's first token."""
        width = self.prompts.shape[1]
        positions = torch.arange(width, device=self.prompts.device).expand_as(self.prompts)
        final, features = self._read(self.prompts, positions, self.columns.visible)
        ends = (self.lengths - 1).unsqueeze(1)
        rows = torch.arange(len(self.rows), device=ends.device).unsqueeze(1)
        self.last = self.target.logits(final[rows, ends]).argmax(-1)[:, 0]
        self._emit([[int(token)] for token in self.last], [0] * len(self.rows), count=False)
        following = torch.cat((self.prompts[:, 1:], self.prompts[:, :1]), 1)
        following[rows, ends] = self.last.unsqueeze(1)
        self._propose(features, following, positions, self.columns.visible, ends)
        self._drop_finished()

    def round(self) -> None:
        """One forward pass of the target, and the next proposals."""
        tokens = torch.cat((self.last.unsqueeze(1), self.proposed), 1)  # [B, K + 1]
        positions = self.lengths.unsqueeze(1) + torch.arange(self.proposals + 1, device=tokens.device)
        old = self.columns.visible
        final, features = self._read(tokens, positions, torch.cat((old, torch.ones_like(tokens, dtype=torch.bool)), 1))
        chosen = self.target.logits(final).argmax(-1)  # [B, K + 1]
        accepted = (self.proposed == chosen[:, :-1]).long().cumprod(1).sum(1)  # [B]
        kept = torch.arange(self.proposals + 1, device=tokens.device) <= accepted.unsqueeze(1)
        width = int(accepted.max()) + 1
        if rejected := self.proposals + 1 - width:
            self.cache.crop(-rejected)
        self.columns.append(kept[:, :width])
        counts = accepted.tolist()
        self._emit([row[: n + 1] for row, n in zip(chosen.tolist(), counts, strict=True)], counts, count=True)
        ends = accepted.unsqueeze(1)
        self.last = chosen.gather(1, ends)[:, 0]
        self.lengths = self.lengths + accepted + 1
        self._propose(features[:, :width], chosen[:, :width], positions[:, :width], self.columns.visible, ends)
        self._drop_finished()

    def _propose(self, features: Tensor, tokens: Tensor, positions: Tensor, visible: Tensor, ends: Tensor) -> None:
        """The draft reads the new columns, then goes on from each row's last one on its own output."""
        columns = visible.shape[1]
        hidden = self.draft.step(functional.linear(features, self.draft.weights.fc), tokens, positions, visible)
        rows = torch.arange(len(ends), device=ends.device).unsqueeze(1)
        hidden, positions = hidden[rows, ends], positions.gather(1, ends)  # [B, 1, H], [B, 1]
        proposed = [self.draft.propose(hidden[:, 0])]
        for step in range(1, self.proposals):
            visible = torch.cat((visible, torch.ones_like(visible[:, :1])), 1)
            hidden = self.draft.step(hidden, proposed[-1].unsqueeze(1), positions + step, visible)
            proposed.append(self.draft.propose(hidden[:, 0]))
        self.draft.cut(columns)
        self.proposed = torch.stack(proposed, 1)

    def _emit(self, tokens: list[list[int]], accepted: list[int], count: bool) -> None:
        for row, new, kept in zip(self.rows, tokens, accepted, strict=True):
            reply = self.replies[row]
            if count:
                reply.accepted.append(kept)
            for place, token in enumerate(new):
                if not self._finished(reply):
                    reply.tokens.append(token)
                    reply.drafted.append(place < kept)

    def _finished(self, reply: Reply) -> bool:
        return len(reply.tokens) >= self.limit or (bool(reply.tokens) and reply.tokens[-1] in self.decoder.end)

    def _drop_finished(self) -> None:
        going = [place for place, row in enumerate(self.rows) if not self._finished(self.replies[row])]
        if len(going) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in going]
        if not going:
            return
        places = torch.tensor(going, device=self.lengths.device)
        self.cache.batch_select_indices(places)
        self.draft.select(places)
        self.columns.visible = self.columns.visible[places]
        self.lengths, self.last, self.proposed = (
            self.lengths[places],
            self.last[places],
            self.proposed[places],
        )


@torch.no_grad()
def greedy_replies(
    target: Target, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_tokens: Sequence[int]
) -> list[list[int]]:
    """The target's own greedy replies, by transformers' generate: the reference, which shares no code with the above.

    Args:
        target: in float32.
        prompts: token ids.
        max_new_tokens: longest reply.
        end_tokens: ids that end a reply.

    Returns:
        New tokens of each prompt, the end token included.
    """
    from transformers import GenerationConfig

    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=target.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=target.device)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(end_tokens) or None, pad_token_id=0
    )
    output = target.model.generate(input_ids=tokens, attention_mask=mask, generation_config=settings)
    replies = []
    for row in output[:, width:].tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in end_tokens), len(row))
        replies.append(row[:end])
    return replies


@torch.no_grad()
def margin_at(target: Target, tokens: Sequence[int]) -> float:
    """How far the target's two best logits lie apart after some tokens."""
    final = target.decoder(
        input_ids=torch.tensor([list(tokens)], device=target.device), use_cache=False
    ).last_hidden_state
    best = target.logits(final[0, -1]).topk(2).values
    return float(best[0] - best[1])
