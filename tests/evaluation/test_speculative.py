"""Speculative decoding: the target's own tokens, and the acceptance that training foresaw."""

import pytest
import torch
from tiny import llama

from draft_model.drafts.eagle3.batch import collate, plan_unroll
from draft_model.drafts.eagle3.config import draft_config_for
from draft_model.drafts.eagle3.model import Eagle3Draft, Rotary
from draft_model.drafts.eagle3.step import Objective
from draft_model.drafts.eagle3.unroll import unroll
from draft_model.evaluation.acceptance import acceptance, by_category, by_depth
from draft_model.evaluation.speculative import Reply, SpeculativeDecoder, greedy_replies
from draft_model.evaluation.tree import DraftTree
from draft_model.target.model import Target

PROMPTS = [[3, 5, 7, 1, 2], [0, 4], [1, 2, 3, 4, 5, 6, 7, 0, 5, 1, 3], [6, 6, 2], [2, 7, 1, 0, 2, 4], [7, 3, 3]]


def pair(vocabulary: int, known: int, seed: int = 0, **changes):
    """A random target and a random draft; with a small vocabulary they agree by chance often enough."""
    model = llama(seed, vocab_size=vocabulary, **changes)
    config = draft_config_for({**model.config.to_dict(), "model_type": "llama"})
    ids = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))[:known].sort().values
    t2d = torch.zeros(vocabulary, dtype=torch.bool)
    t2d[ids] = True
    config = type(config)(**{**vars(config), "draft_vocab_size": known})
    target = Target(model, config.aux_layers)
    draft = Eagle3Draft(config, t2d, ids - torch.arange(known))
    draft.initialise(seed, target)
    return target, draft


@pytest.mark.parametrize("proposals", [1, 3, 6])
@pytest.mark.parametrize("end", [(), (4,)])
def test_decodes_the_targets_own_tokens(proposals, end):
    target, draft = pair(vocabulary=8, known=6, seed=2)
    expected = greedy_replies(target, PROMPTS, 40, end)
    replies = SpeculativeDecoder(target, draft, DraftTree.chain(proposals), end).decode(PROMPTS, 40)
    assert [reply.tokens for reply in replies] == expected
    assert any(reply.accepted and max(reply.accepted) > 0 for reply in replies)


@pytest.mark.parametrize("widths", [(1, 1, 1, 1), (3, 2)])
def test_a_batch_decodes_each_prompt_as_if_it_were_alone(widths):
    target, draft = pair(vocabulary=12, known=12, seed=1)
    decoder = SpeculativeDecoder(target, draft, DraftTree(widths), (5,))
    together = decoder.decode(PROMPTS, 30)
    assert together == [decoder.decode([prompt], 30)[0] for prompt in PROMPTS]


def test_a_sliding_window_target_decodes_its_own_tokens_one_prompt_at_a_time():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=12, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    shape = draft_config_for(config.to_dict())
    target = Target(model, shape.aux_layers)
    draft = Eagle3Draft(shape, torch.ones(12, dtype=torch.bool), torch.zeros(12, dtype=torch.int64))
    draft.initialise(0, target)
    expected = greedy_replies(target, PROMPTS, 20, ())
    assert [r.tokens for r in SpeculativeDecoder(target, draft, DraftTree.chain(2), ()).decode(PROMPTS, 20)] == expected


@torch.no_grad()
def foreseen_rounds(target, draft, tokens, prompt_length, proposals):
    """The rounds that the training-time unroll foresees on a finished conversation."""
    batch = collate([(torch.tensor(tokens), torch.ones(len(tokens), dtype=torch.bool))])
    plan = plan_unroll(batch, proposals)
    states = target.states(batch)[0]
    hidden_size = draft.config.hidden_size
    weights = draft.weights(torch.float32)
    rotary = Rotary(draft.config, target.device).table(len(tokens) + proposals, torch.float32)
    embedded = torch.nn.functional.embedding(batch.tokens.flatten(), target.embedding)
    features = states[:, : 3 * hidden_size]
    hidden = torch.stack(unroll(weights, rotary, embedded, features, plan, "sdpa"))
    proposed = draft.target_ids[(weights.rms_norm(hidden, weights.norm) @ draft.lm_head.weight.T).argmax(-1)]
    row = {int(time): number for number, time in enumerate(plan.time)}
    rounds, start = [], prompt_length - 1
    while start + 2 + proposals <= len(tokens):
        found = 0
        while found < proposals and proposed[found, row[start]] == tokens[start + 2 + found]:
            found += 1
        rounds.append(found)
        start += found + 1
    return rounds


def test_rounds_accept_what_the_training_time_unroll_foresees():
    target, draft = pair(vocabulary=8, known=6, seed=2)
    replies = SpeculativeDecoder(target, draft, DraftTree.chain(3), ()).decode(PROMPTS, 60)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        foreseen = foreseen_rounds(target, draft, prompt + reply.tokens, len(prompt), 3)
        assert len(foreseen) > 10
        assert reply.accepted[: len(foreseen)] == foreseen
    assert sum(sum(reply.accepted) for reply in replies) > 10


def test_training_foresees_the_acceptance_length():
    target, draft = pair(vocabulary=8, known=6, seed=2)
    replies = SpeculativeDecoder(target, draft, DraftTree.chain(3), ()).decode(PROMPTS, 60)
    rows = [(torch.tensor(prompt + reply.tokens), len(prompt)) for prompt, reply in zip(PROMPTS, replies, strict=True)]
    batch = collate([(tokens, torch.arange(len(tokens)) >= start) for tokens, start in rows])
    objective = Objective(draft, target, 3, "sdpa", torch.float32, 80)
    sums = objective(batch, target.states(batch))[1]
    rounds = sum(len(reply.accepted) for reply in replies)
    assert sums.rounds[2] == pytest.approx(rounds, abs=len(PROMPTS))  # a reply's end cuts its last round
    assert sums.kept[2] == pytest.approx(sum(sum(reply.accepted) for reply in replies), abs=3 * len(PROMPTS))
    assert sums.acceptance_length(3) == pytest.approx(acceptance(replies, 3)["acceptance_length"], abs=0.02)


def test_acceptance_counts_rounds_and_positions():
    found = acceptance([Reply(accepted=[0, 2, 3]), Reply(accepted=[1])], proposals=3)
    assert found["acceptance_length"] == 1 + 6 / 4
    assert found["acceptance_by_position"] == [3 / 4, 2 / 4, 1 / 4]
    assert found["conditional_acceptance_by_position"] == [3 / 4, 2 / 3, 1 / 2]
    assert (found["rounds"], found["drafted"], found["accepted"]) == (4, 12, 6)


REPLIES = [Reply(accepted=[0, 2, 3]), Reply(accepted=[1]), Reply(accepted=[3, 3, 3, 3])]


def test_acceptance_is_counted_by_category():
    assert by_category(REPLIES, ["code", "chat", "code"]) == [
        {"category": "code", "prompts": 2, "rounds": 7, "acceptance_length": 1 + 17 / 7},
        {"category": "chat", "prompts": 1, "rounds": 1, "acceptance_length": 2.0},
    ]


def test_acceptance_is_counted_by_the_tokens_before_the_round():
    # The third reply's rounds begin after 1, 5, 9 and 13 tokens, a fifth after 17, a sixth after 18.
    found = by_depth([*REPLIES[:2], Reply(accepted=[3, 3, 3, 3, 0, 3])])
    assert found == [
        {"from": 0, "to": 15, "rounds": 8, "acceptance_length": 1 + 18 / 8},
        {"from": 16, "to": 31, "rounds": 2, "acceptance_length": 1 + 3 / 2},
    ]
