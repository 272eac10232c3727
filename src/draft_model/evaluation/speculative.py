"""Speculative decoding: the draft proposes a chain or a tree of tokens, the target checks them in one forward pass.

Each round the target reads the last token it gave and the proposals, keeps a path of them and adds one token of its
own: one forward pass for 1 + accepted tokens. Greedy, every token is the target's own choice; sampling, every token has
the target's distribution (`accept.py`).

Rows of a batch accept different numbers of tokens. Caches therefore grow by whole columns for all rows, and a column
that a row rejected is masked for that row; trailing columns that no row kept are cut, and of a tree the kept path moves
to the front. With a batch of one and a chain nothing is ever masked, which is what targets with sliding-window layers
need (they count columns, not positions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.evaluation.accept import Walk, draw, sample, walk_greedy, walk_sampled
from draft_model.evaluation.draft_cache import DraftCache, causal
from draft_model.evaluation.tree import DraftTree
from draft_model.target.model import Target


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


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: above 0; what both models' logits are divided by.
        seed: of the random numbers.
    """

    temperature: float
    seed: int


class SpeculativeDecoder:
    """Decodes batches of prompts.

    Args:
        target: in float32.
        draft: its draft.
        tree: what the draft proposes per round.
        end_tokens: ids that end a reply.
        sampling: None for greedy decoding.
    """

    def __init__(
        self,
        target: Target,
        draft: Eagle3Draft,
        tree: DraftTree,
        end_tokens: Sequence[int],
        sampling: Sampling | None = None,
    ) -> None:
        self.target, self.draft, self.tree, self.end = target, draft, tree, frozenset(end_tokens)
        self.temperature = sampling.temperature if sampling else 0.0
        self.generator = torch.Generator(target.device)
        if sampling:
            self.generator.manual_seed(sampling.seed)

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

    def distribution(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from."""
        return (logits / self.temperature).softmax(-1)


class _Batch:
    """The rows still being decoded. `last` is each row's newest token, which the target has not read yet."""

    def __init__(self, decoder: SpeculativeDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        from transformers import DynamicCache

        self.decoder, self.target, self.tree = decoder, decoder.target, decoder.tree
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
        # Cached columns that each row may see, bool [B, C]; all columns are in the order of time.
        self.visible = torch.arange(width, device=device) < self.lengths.unsqueeze(1)
        self.draft = DraftCache(decoder.draft, self.target, width + max_new_tokens + 2 * self.tree.depth + 2)
        self.depths, self.sees = self.tree.depths.to(device), self.tree.sees.to(device)
        self.last = self.proposed = torch.empty(0)
        self.drawn_from: Tensor | None = None

    def _read(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The target over new columns: hidden states after the final norm [B, Q, H] and features [B, Q, 3H]."""
        output = self.target.decoder(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state, self.target.features()

    def prefill(self) -> None:
        """Reads the prompts; the target gives each row's first token."""
        width = self.prompts.shape[1]
        positions = torch.arange(width, device=self.prompts.device).expand_as(self.prompts)
        final, features = self._read(self.prompts, positions, self.visible.long())
        ends = self.lengths - 1
        logits = self.target.logits(final[_rows(ends), ends])
        if self.decoder.temperature:
            self.last = sample(self.decoder.distribution(logits), self.decoder.generator)
        else:
            self.last = logits.argmax(-1)
        self._emit([[int(token)] for token in self.last], [0] * len(self.rows), count=False)
        following = torch.cat((self.prompts[:, 1:], self.prompts[:, :1]), 1)
        following[_rows(ends), ends] = self.last
        self._propose(features, following, positions, ends)
        self._drop_finished()

    def round(self) -> None:
        """One forward pass of the target, and the next proposals."""
        tokens = torch.cat((self.last.unsqueeze(1), self.proposed), 1)  # [B, N]
        positions = self.lengths.unsqueeze(1) + self.depths
        final, features = self._read(tokens, positions, self._tree_mask())
        walk = self._walk(tokens, self.target.logits(final))
        width = int(walk.accepted.max()) + 1
        path = walk.path[:, :width]
        self._keep(path)
        kept = torch.arange(width, device=tokens.device) <= walk.accepted.unsqueeze(1)
        self.visible = torch.cat((self.visible, kept), 1)
        following = torch.cat((tokens.gather(1, path)[:, 1:], path[:, :1]), 1)
        following[_rows(walk.last), walk.accepted] = walk.last
        counts = walk.accepted.tolist()
        self._emit([row[: n + 1] for row, n in zip(following.tolist(), counts, strict=True)], counts, count=True)
        positions = self.lengths.unsqueeze(1) + torch.arange(width, device=tokens.device)
        self.last, self.lengths = walk.last, self.lengths + walk.accepted + 1
        taken = features.gather(1, path.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        self._propose(taken, following, positions, walk.accepted)
        self._drop_finished()

    def _tree_mask(self) -> Tensor:
        """What the proposals see of the target's columns: a plain mask for a chain, [B, 1, N, C + N] for a tree."""
        batch, nodes = len(self.rows), self.tree.size
        if self.tree.is_chain:
            return torch.cat((self.visible, self.visible.new_ones(batch, nodes)), 1).long()
        seen = torch.cat((self.visible.unsqueeze(1).expand(-1, nodes, -1), self.sees.expand(batch, -1, -1)), 2)
        hidden = torch.finfo(torch.float32).min
        return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, hidden).unsqueeze(1)

    def _walk(self, tokens: Tensor, logits: Tensor) -> Walk:
        if self.drawn_from is None:
            return walk_greedy(self.tree, tokens, logits.argmax(-1))
        p, generator = self.decoder.distribution(logits), self.decoder.generator
        return walk_sampled(self.tree, tokens, p, self.drawn_from, generator)

    def _keep(self, path: Tensor) -> None:
        """Leaves of the round's columns in the target's cache those of each row's path, [B, W]."""
        columns, width = self.visible.shape[1], path.shape[1]
        if self.tree.is_chain:
            if rejected := self.tree.size - width:
                self.cache.crop(-rejected)
            return
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                held = getattr(layer, name)  # [B, heads, C + N, d]
                index = (columns + path)[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
                setattr(layer, name, torch.cat((held[:, :, :columns], held.gather(2, index)), 2))

    def _propose(self, features: Tensor, tokens: Tensor, positions: Tensor, ends: Tensor) -> None:
        """The draft reads the new columns, then goes on from each row's last one on its own output, level by level."""
        columns, draft = self.visible.shape[1], self.draft
        mask = causal(self.visible, tokens.shape[1])
        hidden = draft.step(functional.linear(features, draft.weights.fc), tokens, positions, mask)
        rows = _rows(ends)
        hidden, position = hidden[rows, ends].unsqueeze(1), positions[rows, ends]  # [B, 1, H], [B]
        proposed: list[Tensor] = []
        distributions: list[Tensor] = []
        for depth, width in enumerate(self.tree.widths):
            if depth:
                level = self.tree.levels[depth]
                seen = self.sees[level.start : level.stop, 1 : level.stop].expand(len(rows), -1, -1)
                mask = torch.cat((self.visible.unsqueeze(1).expand(-1, len(level), -1), seen), 2)
                parents = torch.arange(len(level), device=rows.device) // self.tree.widths[depth - 1]
                at = (position + depth).unsqueeze(1).expand(-1, len(level))
                hidden = draft.step(hidden[:, parents], proposed[-1], at, mask)
            found, distribution = self._candidates(draft.logits(hidden), width)
            proposed.append(found)
            distributions.append(distribution)
        draft.cut(columns)
        self.proposed = torch.cat(proposed, 1)
        self.drawn_from = torch.cat(distributions, 1) if self.decoder.temperature else None

    def _candidates(self, logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Children of each node of a level, [B, F * width], and what they were drawn from, [B, F, V]."""
        ids = self.draft.target_ids
        if not self.decoder.temperature:
            return ids[logits.topk(width, -1).indices].flatten(1), logits
        q = self.decoder.distribution(logits)
        found = draw(q, width, self.decoder.generator)
        whole = q.new_zeros(*q.shape[:2], len(self.target.head))
        whole[..., ids] = q
        return ids[found].flatten(1), whole

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
        self.visible, self.lengths = self.visible[places], self.lengths[places]
        self.last, self.proposed = self.last[places], self.proposed[places]
        if self.drawn_from is not None:
            self.drawn_from = self.drawn_from[places]


def _rows(of: Tensor) -> Tensor:
    return torch.arange(len(of), device=of.device)


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
