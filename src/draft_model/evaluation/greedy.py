"""Greedy speculative decoding in float32: the proof, on machines without an engine, that a draft changes no output.

Each round the target reads its newest token and the K proposals in one forward pass, keeps the proposals that are its
own choices and adds one token. The reference, transformers' `generate`, shares no code with this.

Rows of a batch accept different numbers of tokens. Caches grow by whole columns, and a column that a row rejected is
masked for that row; trailing columns that no row kept are cut. Layers that do not attend to the whole context have
no columns to mask, so such targets are decoded one prompt at a time; a recurrent state cannot be cut back either, so a
target with recurrent layers reads its whole context again in each round.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from tqdm import tqdm

from draft_model.drafts import family
from draft_model.drafts.base import Draft
from draft_model.engine import Counts, Job, Measured
from draft_model.regenerate.batched import generate
from draft_model.target.model import Target

BATCH = 16  # prompts decoded at once; a CPU does 16 rows in about the time of one


@dataclass
class Reply:
    """What was decoded for one prompt."""

    tokens: list[int] = field(default_factory=list)  # new ones, the end token included
    drafted: list[bool] = field(default_factory=list)  # for each of them, whether the draft proposed it
    accepted: list[int] = field(default_factory=list)  # proposals that each round kept


_WHOLE, _ATTENTION = {"full_attention", "dummy"}, {"sliding_attention", "chunked_attention"}


def layer_types(target: Target) -> set[str]:
    """Kinds of the target's layers, as transformers' caches have them."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    return set(get_layer_types_and_kwargs(target.config)[0])


def is_recurrent(target: Target) -> bool:
    """Whether a target has recurrent, convolution or linear-attention layers."""
    return bool(target.model._is_stateful) or not layer_types(target) <= _WHOLE | _ATTENTION


def batch_size(target: Target) -> int:
    """Prompts at once: one where a layer does not attend to the whole context."""
    return BATCH if layer_types(target) <= _WHOLE and not is_recurrent(target) else 1


def run(job: Job, target: Target, draft: Draft | None, label: str, hardware: str) -> Measured:
    """Decodes all prompts in batches of like length, with a draft or by the target alone (None), in float32."""
    prompts = [prompt for group in job.groups for prompt in group]
    replies, margins = [Reply() for _ in prompts], [[0.0] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    size, interval = batch_size(target), 0.5 if sys.stderr.isatty() else 15.0
    started = time.perf_counter()
    with tqdm(total=len(prompts), desc=label, unit="prompt", mininterval=interval, dynamic_ncols=True) as bar:
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            batch = [prompts[index] for index in indices]
            if draft is None:
                pairs = reference(target, batch, job)
            else:
                pairs = [(reply, []) for reply in decode(target, draft, batch, job)]
            for index, pair in zip(indices, pairs, strict=True):
                replies[index], margins[index] = pair
            bar.update(len(indices))
    seconds = time.perf_counter() - started
    ends = list(accumulate(map(len, job.groups)))
    groups = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return Measured(
        engine="this project's own decoder",
        hardware=hardware,
        dtype="float32",
        outputs=[[reply.tokens for reply in replies[group]] for group in groups],
        margins=[] if draft else [margins[group] for group in groups],
        counts=[counts_of(replies[group], job.proposals) for group in groups] if draft else [],
        drafted=[[reply.drafted for reply in replies[group]] for group in groups] if draft else [],
        speed={size: sum(len(reply.tokens) for reply in replies) / seconds},
    )


def counts_of(replies: Sequence[Reply], proposals: int) -> Counts:
    """Counts of all rounds, as vLLM has them."""
    rounds = [count for reply in replies for count in reply.accepted]
    by_position = [sum(count > index for count in rounds) for index in range(proposals)]
    return Counts(len(rounds), len(rounds) * proposals, sum(rounds), by_position)


@torch.no_grad()
def decode(target: Target, draft: Draft, prompts: Sequence[Sequence[int]], job: Job) -> list[Reply]:
    """Decodes one batch with a draft; the job says how many tokens to propose, and where replies end."""
    batch = _Batch(target, draft, prompts, job)
    while batch.rows:
        batch.round()
    return batch.replies


class _Batch:
    """The rows still being decoded. `last` is each row's newest token, which the target has not read yet."""

    def __init__(self, target: Target, draft: Draft, prompts: Sequence[Sequence[int]], job: Job) -> None:
        from transformers import DynamicCache

        self.target, self.proposals = target, job.proposals
        self.limit, self.end = job.max_new_tokens, frozenset(job.end_tokens)
        self.replies = [Reply() for _ in prompts]
        self.rows = list(range(len(prompts)))
        device = target.device
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = int(self.lengths.max())
        tokens = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)  # [B, T]
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(list(prompt), device=device)
        self.cache = None if is_recurrent(target) else DynamicCache()
        self.context = tokens[:, :0]  # what a recurrent target reads again
        # Cached columns that each row may see, bool [B, C]; columns are in the order of time.
        self.visible = torch.arange(width, device=device) < self.lengths.unsqueeze(1)
        length = width + self.limit + 2 * self.proposals + 2
        self.proposer = family(draft.config.family).proposer(draft, target, length)
        positions = torch.arange(width, device=device).expand_as(tokens)
        final, features = self._read(tokens, positions, self.visible)
        ends, rows = self.lengths - 1, torch.arange(len(prompts), device=device)
        self.last = target.logits(final[rows, ends]).argmax(-1)
        self._emit([[token] for token in self.last.tolist()], None)
        following = torch.cat((tokens[:, 1:], tokens[:, :1]), 1)
        following[rows, ends] = self.last
        self.proposed = self.proposer.propose(features, following, positions, self.visible, ends, self.proposals)
        self._drop_finished()

    def round(self) -> None:
        """One forward pass of the target, and the next proposals."""
        tokens = torch.cat((self.last.unsqueeze(1), self.proposed), 1)  # [B, K + 1]
        batch, width = tokens.shape
        positions = self.lengths.unsqueeze(1) + torch.arange(width, device=tokens.device)
        mask = torch.cat((self.visible, self.visible.new_ones(batch, width)), 1)
        final, features = self._read(tokens, positions, mask)
        chosen = self.target.logits(final).argmax(-1)  # [B, K + 1]
        accepted = (chosen[:, :-1] == self.proposed).long().cumprod(1).sum(1)  # [B]
        width = int(accepted.max()) + 1
        if rejected := self.proposals + 1 - width:  # the last columns, which no row kept
            if self.cache is None:
                self.context = self.context[:, :-rejected]
            else:
                self.cache.crop(-rejected)
        kept = torch.arange(width, device=tokens.device) <= accepted.unsqueeze(1)
        self.visible = torch.cat((self.visible, kept), 1)
        counts = accepted.tolist()
        self._emit([row[: n + 1] for row, n in zip(chosen.tolist(), counts, strict=True)], counts)
        self.last = chosen.gather(1, accepted.unsqueeze(1)).squeeze(1)
        self.lengths = self.lengths + accepted + 1
        # Up to `accepted`, the token after a column is the target's choice there.
        self.proposed = self.proposer.propose(
            features[:, :width], chosen[:, :width], positions[:, :width], self.visible, accepted, self.proposals
        )
        self._drop_finished()

    def _read(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The target over new columns: hidden states after the final norm [B, Q, H] and features [B, Q, nH]."""
        width = tokens.shape[1]
        if self.cache is None:
            self.context = torch.cat((self.context, tokens), 1)
            final = self.target.decoder(input_ids=self.context, use_cache=False).last_hidden_state
            return final[:, -width:], self.target.features()[:, -width:]
        output = self.target.decoder(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state, self.target.features()

    def _emit(self, tokens: list[list[int]], accepted: list[int] | None) -> None:
        """Appends each row's new tokens; `accepted` is None after the prompt's own pass, which is no round."""
        for index, (row, new) in enumerate(zip(self.rows, tokens, strict=True)):
            reply, kept = self.replies[row], accepted[index] if accepted else 0
            if accepted:
                reply.accepted.append(kept)
            for place, token in enumerate(new):
                if not self._finished(reply):
                    reply.tokens.append(token)
                    reply.drafted.append(place < kept)

    def _finished(self, reply: Reply) -> bool:
        return len(reply.tokens) >= self.limit or (bool(reply.tokens) and reply.tokens[-1] in self.end)

    def _drop_finished(self) -> None:
        going = [index for index, row in enumerate(self.rows) if not self._finished(self.replies[row])]
        if len(going) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in going]
        if not going:
            return
        indices = torch.tensor(going, device=self.lengths.device)
        if self.cache is not None:
            self.cache.batch_select_indices(indices)
        self.proposer.select(indices)
        self.visible, self.lengths = self.visible[indices], self.lengths[indices]
        self.last, self.proposed = self.last[indices], self.proposed[indices]


def reference(target: Target, prompts: Sequence[Sequence[int]], job: Job) -> list[tuple[Reply, list[float]]]:
    """The target's own greedy replies by transformers' `generate`, and by how much each token was the best."""
    margins: list[Tensor] = []

    def record(_tokens: Tensor, logits: Tensor) -> Tensor:
        best = logits.topk(2, -1).values
        margins.append(best[:, 0] - best[:, 1])
        return logits

    rows = generate(target.model, prompts, job.max_new_tokens, job.end_tokens, [record])
    replies = []
    for row, apart in zip(rows, torch.stack(margins, 1).tolist(), strict=True):
        end = next((index + 1 for index, token in enumerate(row) if token in job.end_tokens), len(row))
        replies.append((Reply(row[:end]), apart[:end]))
    return replies
