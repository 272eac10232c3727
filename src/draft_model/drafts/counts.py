"""What objectives count, and the rounds of decoding that their agreements would make."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass
class Counts:
    """Sums over positions, float64 [n], an entry for each unroll step or proposal of a block.

    Sums of micro-batches, ranks and steps are added; nothing is divided before.
    """

    loss: Tensor  # summed, nats
    supervised: Tensor  # positions that the loss counts: those whose target's top token the draft's vocabulary has
    agree: Tensor  # of those, where the draft's top token is the target's
    overlap: Tensor  # sum of sum_v min(p, q): the acceptance probability under sampling
    candidates: Tensor  # positions whose token is the assistant's, in the draft vocabulary or not
    reached: Tensor  # candidates all of whose earlier entries agreed
    accepted: Tensor  # of those, this one agrees as well
    rounds: Tensor  # rounds of decoding the replies with 1, 2, ... proposals.
    kept: Tensor  # proposals that those rounds keep

    @classmethod
    def zeros(cls, size: int, device: torch.device | None = None) -> Self:
        """No positions yet."""
        return cls.from_tensor(torch.zeros(len(fields(cls)), size, dtype=torch.float64, device=device))

    def tensor(self) -> Tensor:
        """All sums as one tensor [fields, n], to be reduced."""
        return torch.stack(list(vars(self).values()))

    @classmethod
    def from_tensor(cls, sums: Tensor) -> Self:
        """The inverse of `tensor`; also of the same numbers in one row."""
        return cls(*sums.view(len(fields(cls)), -1).unbind(0))

    @classmethod
    def of(cls, sums: Tensor, exists: Tensor, agrees: Tensor, replies: Replies | None) -> Self:
        """Counts of a batch's N rows.

        Args:
            sums: loss, supervised, agree and overlap, float64 [4, n].
            exists: of each entry and row, whether its token is the assistant's, bool [n, N].
            agrees: whether the draft's top token is the target's there, bool [n, N].
            replies: where rounds of decoding start; None where the rows are a random choice of those places: the mean
                over them is taken.
        """
        agreed = (agrees & exists).cummin(0).values
        before = torch.cat((torch.ones_like(agreed[:1]), agreed[:-1])) & exists
        chains = torch.stack((exists, before, before & agrees)).sum(-1, dtype=torch.float64)
        if replies:
            rounds = replies.decode(agreed.sum(0), len(agreed))
        else:
            rounds = torch.stack((torch.full_like(chains[2], exists.shape[1]), chains[2].cumsum(0)))
        return cls.from_tensor(torch.cat((sums, chains, rounds)))

    def cpu(self) -> Self:
        """The same on the host."""
        return self.from_tensor(self.tensor().cpu())

    def __add__(self, other: Self) -> Self:
        return self.from_tensor(self.tensor() + other.tensor())

    @property
    def divisor(self) -> Tensor:
        """What a summed gradient is divided by to be a mean, a scalar; where it is 0, nothing was supervised."""
        return self.supervised[0]

    def means(self) -> dict[str, list[float]]:
        """By entry: loss in nats, top-1 agreement, alpha (overlap), conditional acceptance."""
        supervised, candidates = self.supervised.clamp(min=1), self.candidates.clamp(min=1)
        return {
            "loss": (self.loss / supervised).tolist(),
            "agreement": (self.agree / candidates).tolist(),
            "alpha": (self.overlap / supervised).tolist(),
            "conditional_acceptance": (self.accepted / self.reached.clamp(min=1)).tolist(),
        }

    def acceptance_length(self, proposals: int) -> float:
        """Acceptance length that greedy decoding of these replies would have: 1 + kept / rounds.

        The product of mean acceptances, 1 + a0 + a0 a1 + ..., would be higher: it weighs all positions alike, but
        decoding passes easy ones several at a time and starts most rounds at hard ones.
        """
        index = min(proposals, len(self.rounds)) - 1
        return 1.0 + float(self.kept[index] / self.rounds[index].clamp(min=1))

    def measures(self, proposals: int) -> dict[str, Any]:
        """A log record: means, None where no position was supervised, and acceptance lengths."""
        known = (self.supervised > 0).tolist()
        return {
            **{
                name: [value if there else None for value, there in zip(values, known, strict=True)]
                for name, values in self.means().items()
            },
            "acceptance_length": self.acceptance_length(proposals),
            "acceptance_length_by_proposals": [self.acceptance_length(k) for k in range(1, len(known) + 1)],
        }


@dataclass(frozen=True)
class Replies:
    """Rows from which a round of decoding may start, reply after reply. Q rows, all indices int64."""

    rows: Tensor  # numbers of the rows, [Q]
    ends: Tensor  # for each of these, where its reply ends among the Q, [Q]
    starts: Tensor  # where the replies begin among the Q, [replies]
    longest: int  # rows of the longest reply

    @classmethod
    def of(cls, rows: Tensor, reply: Tensor) -> Self:
        """From the rows, and which reply each is of: numbers that differ between neighbours, [Q]."""
        sizes = reply.unique_consecutive(return_counts=True)[1]
        ends = sizes.cumsum(0)
        longest = int(sizes.max()) if len(sizes) else 0
        return cls(rows, ends.repeat_interleave(sizes), ends - sizes, longest)

    def decode(self, agreed: Tensor, steps: int) -> Tensor:
        """Walks through every reply as decoding would, for 1, 2, ... proposals per round.

        A round at a row keeps as many proposals as agree there and goes on behind the token after them. The walk is
        done for all rows at once by doubling: after n rounds of it, each row knows the sums of its next 2^n rounds.

        Args:
            agreed: leading steps of each row that agree, int64 [N].
            steps: most proposals.

        Returns:
            Rounds and kept proposals, float64 [2, steps].
        """
        count = len(self.rows)
        limit = torch.arange(1, steps + 1, device=agreed.device).unsqueeze(1)
        kept = torch.zeros(steps, count + 1, dtype=torch.int64, device=agreed.device)  # the last entry is the end
        kept[:, :count] = agreed[self.rows].clamp(max=limit)
        rounds = torch.ones_like(kept)
        rounds[:, count] = 0
        following = torch.arange(count + 1, device=agreed.device) + kept + 1
        ends = torch.cat((self.ends, self.ends.new_zeros(1)))
        following = torch.where(following < ends, following, count)
        for _ in range(math.ceil(math.log2(self.longest + 1))):
            rounds = rounds + rounds.gather(1, following)
            kept = kept + kept.gather(1, following)
            following = following.gather(1, following)
        return torch.stack((rounds, kept))[:, :, self.starts].sum(2, dtype=torch.float64)
