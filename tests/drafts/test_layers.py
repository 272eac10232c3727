"""Weights cast once for several micro-batches: the numbers of casts anew, to the bit; records on their way to a GPU."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from draft_model.drafts import batch
from draft_model.drafts.eagle3.plan import plan_unroll
from draft_model.drafts.layers import cast_once
from draft_model.training.optimizer import Gradients
from drafts.dspark import case as blocks
from drafts.eagle3 import case as chains

FAMILIES = {
    "eagle3": (chains.random_case, {}),
    "eagle3.1": (chains.random_case, {"fc_norm": True, "norm_output": True}),
    "dspark": (blocks.random_case, {}),
    "dflash": (blocks.random_case, blocks.DFLASH),
}


class Casts(TorchDispatchMode):
    """Counts by weight, as the address of its first number, how often it is read to be cast."""

    def __init__(self, draft):
        super().__init__()
        self.counts = {weight.data_ptr(): 0 for weight in draft.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func.overloadpacket in (aten._to_copy, aten.copy_, aten._foreach_copy_):
            for tensor in tree_leaves(args[func.overloadpacket is not aten._to_copy :]):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    address = tensor.data_ptr()
                    self.counts |= {address: self.counts[address] + 1} if address in self.counts else {}
        return func(*args, **(kwargs or {}))


def micro_batches(case, once):
    """Loss, sums and gradients of three micro-batches in bfloat16, and how often each weight was cast."""
    objective = (
        case.on("cpu", 3, dtype=torch.bfloat16)[0] if hasattr(case, "on") else case.objective("tv", torch.bfloat16)
    )
    draft = case.draft
    gradients, results = Gradients(draft.parameters()), []
    with Casts(draft) as casts, cast_once(draft, torch.bfloat16) if once else nullcontext():
        for row in range(3):
            part = case.only([row])
            loss, sums = objective(part.batch, [states.bfloat16() for states in part.states])
            loss.backward()
            results += [loss.detach(), sums.tensor()]
    return [*results, gradients._flat], [casts.counts[weight.data_ptr()] for weight in draft.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_with_one_cast_of_each_weight_give_the_same_to_the_bit(family):
    random_case, changes = FAMILIES[family]
    case = random_case(1, [17, 9, 12], **changes)
    anew, often = micro_batches(case, once=False)
    once, counts = micro_batches(case, once=True)
    assert all(gradient.dtype == torch.float32 for gradient in (weight.grad for weight in case.draft.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(once, anew, strict=True))
    assert once[-1].any()
    names = [name for name, _ in case.draft.named_parameters()]
    # Of the Markov head each micro-batch embeds a few rows, and puts w2 beside the target's head.
    counts, often = (
        {n: c for n, c in zip(names, of, strict=True) if "_head.markov" not in n and "confidence" not in n}
        for of in (counts, often)
    )
    assert set(counts.values()) == {1}
    assert min(often.values()) >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_cast_as_they_are_when_it_is_asked_for(family):
    random_case, changes = FAMILIES[family]
    case = random_case(2, [12, 9], **changes)
    before = micro_batches(random_case(2, [17, 9, 12], **changes), once=True)[0]
    assert not any(hasattr(weight, "copy_in_compute_type") for weight in case.draft.parameters())
    other = random_case(2, [17, 9, 12], **changes)
    with torch.no_grad():
        for weight in other.draft.parameters():
            weight.mul_(1.1)
    assert not torch.equal(micro_batches(other, once=True)[0][0], before[0])


def test_in_float32_nothing_is_copied():
    draft = nn.Linear(3, 2)
    with cast_once(draft, torch.float32):
        assert not hasattr(draft.weight, "copy_in_compute_type")


def test_a_record_moves_in_one_transfer(monkeypatch):
    sent = []
    monkeypatch.setattr(batch, "to_device", lambda tensor, _device: sent.append(tensor) or tensor)
    plan = plan_unroll(chains.random_case(1, [17, 9, 12]).batch, 3)
    moved = batch.move(plan, torch.device("meta"))
    assert len(sent) == 1
    assert moved.windows.places is not plan.windows.places
    for one, other in ((plan, moved), (plan.windows, moved.windows), (plan.replies, moved.replies)):
        for name, value in vars(one).items():
            found = getattr(other, name)
            same = isinstance(value, torch.Tensor) and torch.equal(value, found) and value.dtype == found.dtype
            assert same or name in ("windows", "replies") or value == found
    assert batch.move(plan, torch.device("cpu")) is plan
