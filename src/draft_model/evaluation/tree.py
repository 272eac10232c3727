"""What a draft proposes in one round: a chain of tokens, or a static tree whose branches the target checks at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftTree:
    """A tree of proposals. Node 0 is the target's newest token; a chain is a tree without branches.

    Attributes:
        widths: children of every node at depth 0, 1, ...; (1, 1, 1) is a chain of three, (3, 2) has 3 + 6 proposals.
    """

    widths: tuple[int, ...]

    @classmethod
    def chain(cls, proposals: int) -> DraftTree:
        """A chain of so many proposals."""
        return cls((1,) * proposals)

    @classmethod
    def parse(cls, text: str) -> DraftTree:
        """Reads widths from the text of parameter evaluation_tree, such as `4,2,1`."""
        return cls(tuple(map(int, text.split(","))))

    @property
    def depth(self) -> int:
        """Proposals on the longest path."""
        return len(self.widths)

    @property
    def is_chain(self) -> bool:
        """Whether no node has two children."""
        return set(self.widths) <= {1}

    @property
    def size(self) -> int:
        """Nodes, the root included: tokens that the target reads per round."""
        return len(self.parents) + 1

    @cached_property
    def levels(self) -> tuple[range, ...]:
        """The nodes of each depth, the root's first; a node's children stand side by side."""
        levels = [range(1)]
        for width in self.widths:
            start = levels[-1].stop
            levels.append(range(start, start + len(levels[-1]) * width))
        return tuple(levels)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """The parent of each node but the root."""
        return tuple(
            parent
            for width, level in zip(self.widths, self.levels, strict=False)
            for parent in level
            for _ in range(width)
        )

    @cached_property
    def depths(self) -> Tensor:
        """The depth of each node, int64 [N]."""
        return torch.tensor([depth for depth, level in enumerate(self.levels) for _ in level])

    @cached_property
    def sees(self) -> Tensor:
        """Which nodes each node descends from, itself included, bool [N, N]."""
        sees = torch.eye(self.size, dtype=torch.bool)
        for node, parent in enumerate(self.parents, start=1):
            sees[node] |= sees[parent]
        return sees

    @cached_property
    def children(self) -> Tensor:
        """The children of each node, int64 [N, widest]; -1 where there are fewer."""
        children = torch.full((self.size, max(self.widths, default=1)), -1)
        for width, level, below in zip(self.widths, self.levels, self.levels[1:], strict=False):
            children[level.start : level.stop, :width] = torch.tensor(list(below)).view(len(level), width)
        return children
