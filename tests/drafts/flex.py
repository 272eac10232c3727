"""FlexAttention's masks against the dense mask that they stand for, and a dense form with a backward for CPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from draft_model.drafts.kernels import FLEX_TILE


def assert_is_mask(mask: Any, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Holds a block mask against a dense one of its padded size; gives its tiles and those that the dense one needs."""
    assert mask.seq_lengths == truth.shape
    query, key = (torch.arange(size) for size in truth.shape)
    assert torch.equal(mask.mask_mod(None, None, query.unsqueeze(1), key), truth)
    tiles = truth.unflatten(1, (-1, FLEX_TILE)).unflatten(0, (-1, FLEX_TILE)).transpose(1, 2).flatten(2)

    def listed(counts: Tensor, order: Tensor) -> Tensor:
        first = torch.arange(tiles.shape[1]) < counts[0, 0].unsqueeze(1)
        return torch.zeros_like(first).scatter_(1, order[0, 0].long(), first)

    partial, whole = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & whole).any()
    assert not (whole & ~tiles.all(2)).any()
    assert not (tiles.any(2) & ~(partial | whole)).any()
    return partial | whole, tiles.any(2)


def dense_flex(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, enable_gqa: bool, return_aux: Any = None) -> Any:
    """What flex_attention computes, for float32 tensors [1, heads, length, d]; on a CPU that one has no backward."""
    for leaf in (x for x in (q, k, v) if x.is_leaf):
        leaf.requires_grad_()
    assert enable_gqa
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    sees = block_mask.mask_mod(None, None, torch.arange(q.shape[2]).unsqueeze(1), torch.arange(k.shape[2]))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~sees, -1e30)  # padding sees nothing, and nobody reads it
    out = scores.softmax(-1) @ v
    return out if return_aux is None else (out, SimpleNamespace(lse=scores.logsumexp(-1)))
