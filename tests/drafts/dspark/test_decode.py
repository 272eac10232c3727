"""Our own decoder with block drafts: the target's own tokens, and the acceptance that training simulates."""

from __future__ import annotations

import pytest
import torch
from tiny import llama

from draft_model import drafts
from draft_model.drafts.batch import collate
from draft_model.drafts.files import vocabulary_of
from draft_model.engine import Job
from draft_model.evaluation.greedy import counts_of, decode, reference
from draft_model.target.model import Target

PROMPTS = [[3, 5, 7, 1, 2], [0, 4], [1, 2, 3, 4, 5, 6, 7, 0, 5, 1, 3], [6, 6, 2], [2, 7, 1, 0, 2, 4], [7, 3, 3]]
FAMILIES = ["dflash", "dspark"]


def pair(name: str, seed: int, **changes):
    """A random target of eight tokens and a draft of it, whose Markov head does something."""
    model = llama(seed, **{"vocab_size": 8, **changes})
    family = drafts.family(name)
    shape = family.adapt(
        family.default_shape({**model.config.to_dict(), "model_type": "llama"}), {"num_hidden_layers": 2}
    )
    target = Target(model, shape.aux_layers)
    draft = family.create(shape, *vocabulary_of({}, shape))
    draft.initialise(seed, target)
    if name == "dspark":
        torch.nn.init.normal_(draft.markov_head.markov_w2.weight, std=0.05)
    return family, target, draft


def job(proposals, limit, end=()):
    return Job("", "", "dspark", {}, proposals, [], limit, list(end), 0.0, 0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("proposals", "end"), [(1, ()), (7, (4,))])
def test_decodes_the_targets_own_tokens(name, proposals, end):
    _, target, draft = pair(name, 4)
    replies = decode(target, draft, PROMPTS, job(proposals, 40, end))
    assert [reply.tokens for reply in replies] == [r.tokens for r, _ in reference(target, PROMPTS, job(1, 40, end))]
    assert any(reply.accepted and max(reply.accepted) > 0 for reply in replies)
    assert replies[1:3] == [decode(target, draft, [prompt], job(proposals, 40, end))[0] for prompt in PROMPTS[1:3]]


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_accepts_what_the_objective_says(name):
    """On the target's own replies the simulated acceptance is the decoder's, round for round."""
    family, target, draft = pair(name, 3)
    count = draft.config.proposals
    replies = decode(target, draft, PROMPTS, job(count, 41))
    rows = [prompt + reply.tokens for prompt, reply in zip(PROMPTS, replies, strict=True)]
    masks = [[False] * len(prompt) + [True] * len(reply.tokens) for prompt, reply in zip(PROMPTS, replies, strict=True)]
    batch = collate([(torch.tensor(row), torch.tensor(mask)) for row, mask in zip(rows, masks, strict=True)])
    objective = family.objective(draft, target, 7, "sdpa", torch.float32, 80, "tv")
    with torch.no_grad():
        _, sums = objective(batch, target.states(batch))
    counts = counts_of(replies, count)
    # The last round of a reply is cut by the limit; the objective does not count proposals beyond the reply's end.
    assert int(sums.rounds[-1]) == counts.rounds
    assert int(sums.kept[-1]) <= counts.accepted <= int(sums.kept[-1]) + count * len(PROMPTS)
    assert sums.acceptance_length(count) == pytest.approx(1 + counts.accepted / counts.rounds, rel=0.1)
    assert counts.accepted
