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


def decode_rounds(plan: Any, agreed: Tensor) -> tuple[Tensor, Tensor]:
    """Walks through every reply as decoding would, for 1, 2, ... proposals per round.

    A round at a row keeps as many proposals as agree there and goes on behind the token after them. The walk is done
    for all rows at once by doubling: after n rounds of it, each row knows the sums of its next 2^n rounds.

    Args:
        plan: with reply_rows, reply_ends, reply_starts, longest_reply and steps, as the families' plans have them.
        agreed: leading steps of each row that agree, int64 [N].

    Returns:
        Rounds and kept proposals, float64 [steps] each.
    """
    count, steps = len(plan.reply_rows), plan.steps
    limit = torch.arange(1, steps + 1, device=agreed.device).unsqueeze(1)
    kept = torch.zeros(steps, count + 1, dtype=torch.int64, device=agreed.device)  # the last entry is the end
    kept[:, :count] = agreed[plan.reply_rows].clamp(max=limit)
    rounds = torch.ones_like(kept)
    rounds[:, count] = 0
    following = torch.arange(count + 1, device=agreed.device) + kept + 1
    ends = torch.cat((plan.reply_ends, plan.reply_ends.new_zeros(1)))
    following = torch.where(following < ends, following, count)
    for _ in range(math.ceil(math.log2(plan.longest_reply + 1))):
        rounds = rounds + rounds.gather(1, following)
        kept = kept + kept.gather(1, following)
        following = following.gather(1, following)
    begin = plan.reply_starts
    return rounds[:, begin].sum(1, dtype=torch.float64), kept[:, begin].sum(1, dtype=torch.float64)
