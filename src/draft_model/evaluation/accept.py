"""Which proposals a round keeps, and the target's token after them.

Greedy: a proposal is kept where it is the target's own choice. Sampling: a proposal x, drawn from the draft's q, is
kept with probability min(1, p(x) / q(x)); where it is refused, the next candidate is held against what p has over q,
and where none is left, that remainder gives the token. So every token has the target's distribution p, whatever the
draft proposes (Leviathan et al., arXiv 2211.17192; candidates without replacement: Sequoia, arXiv 2402.12374).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from draft_model.evaluation.tree import DraftTree


@dataclass(frozen=True)
class Walk:
    """The path through the tree that each row kept. B rows, a tree of depth K.

    Attributes:
        path: node at each depth, int64 [B, K + 1]; the root's 0 at the start, and 0 after the last that was kept.
        accepted: proposals that were kept, int64 [B].
        last: the target's token after them, int64 [B].
    """

    path: Tensor
    accepted: Tensor
    last: Tensor


def walk_greedy(tree: DraftTree, tokens: Tensor, chosen: Tensor) -> Walk:
    """Follows the target's own choices.

    Args:
        tree: what was proposed.
        tokens: of its nodes, int64 [B, N].
        chosen: the target's best token after each node, int64 [B, N].
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    node, path = torch.zeros_like(rows), [torch.zeros_like(rows)]
    alive = torch.ones_like(rows, dtype=torch.bool)
    children = tree.children.to(tokens.device)
    for _ in range(tree.depth):
        candidates = children[node]  # [B, W]
        fits = (tokens.gather(1, candidates.clamp_min(0)) == chosen[rows, node].unsqueeze(1)) & (candidates >= 0)
        alive = alive & fits.any(1)
        node = torch.where(alive, candidates.gather(1, fits.long().argmax(1, keepdim=True))[:, 0], node)
        path.append(torch.where(alive, node, 0))
    nodes = torch.stack(path, 1)
    return Walk(nodes, (nodes > 0).sum(1), chosen[rows, node])


def walk_sampled(tree: DraftTree, tokens: Tensor, p: Tensor, q: Tensor, generator: torch.Generator) -> Walk:
    """Keeps or refuses each proposal by chance, so that the target's distribution stays.

    Args:
        tree: what was proposed.
        tokens: of its nodes, int64 [B, N]; siblings were drawn from q without replacement, in their order.
        p: the target's distribution after each node, [B, N, V].
        q: the draft's after each node that has children, [B, M, V] with M <= N.
        generator: of the random numbers.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    node, path = torch.zeros_like(rows), [torch.zeros_like(rows)]
    alive = torch.ones_like(rows, dtype=torch.bool)
    children, left = tree.children.to(tokens.device), p[:, 0]  # [B, V]
    for width in tree.widths:
        drawn, following = q[rows, node], torch.zeros_like(node)
        for place in range(width):
            child = children[node, place].clamp_min(0)
            token = tokens[rows, child]
            chance = torch.rand(len(rows), generator=generator, device=tokens.device)
            trying = alive & (following == 0)
            kept = trying & keeps(left[rows, token], drawn[rows, token], chance)
            refused = (trying & ~kept).unsqueeze(1)
            left = torch.where(refused, remainder(left, drawn), left)
            drawn = torch.where(refused, without(drawn, token), drawn)
            left = torch.where(kept.unsqueeze(1), p[rows, child], left)
            following = torch.where(kept, child, following)
        alive = following > 0
        node = torch.where(alive, following, node)
        path.append(following)
    nodes = torch.stack(path, 1)
    return Walk(nodes, (nodes > 0).sum(1), sample(left, generator))


def keeps(p: Tensor, q: Tensor, chance: Tensor) -> Tensor:
    """Whether proposals are kept: with probability min(1, p / q).

    Args:
        p: the target's probability of each, [B].
        q: the draft's, [B].
        chance: uniform in [0, 1), [B].
    """
    return chance * q < p


def remainder(p: Tensor, q: Tensor) -> Tensor:
    """What the target still owes after a refusal: the positive part of p - q, normalised, [B, V]."""
    over = functional.relu(p - q)
    total = over.sum(-1, keepdim=True)
    return torch.where(total > 0, over / total.clamp_min(1e-30), p)


def without(q: Tensor, token: Tensor) -> Tensor:
    """The distribution q [B, V] after each row's token was drawn and put aside."""
    rest = q.scatter(-1, token.unsqueeze(1), 0.0)
    return rest / rest.sum(-1, keepdim=True).clamp_min(1e-30)


def sample(p: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each distribution: [..., V] -> [...]."""
    return draw(p, 1, generator)[..., 0]


def draw(p: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Tokens of each distribution, one after the other without replacement: [..., V] -> [..., count].

    The exponential race: p / e with e ~ Exp(1) is highest at x with probability p(x), and so on for the rest.
    """
    noise = torch.empty_like(p).exponential_(generator=generator)
    return (p / noise.clamp_min(1e-30)).topk(count, -1).indices
