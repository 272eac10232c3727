"""Greedy decoding: the target's own tokens, and the acceptance that training simulates."""

from dataclasses import replace

import pytest
import torch
from tiny import llama

from draft_model.drafts.batch import collate
from draft_model.drafts.eagle3.config import draft_config_for
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.drafts.eagle3.objective import Objective
from draft_model.engine import Counts, Job
from draft_model.evaluation.greedy import Reply, batch_size, counts_of, decode, is_recurrent, reference
from draft_model.target.model import Target

PROMPTS = [[3, 5, 7, 1, 2], [0, 4], [1, 2, 3, 4, 5, 6, 7, 0, 5, 1, 3], [6, 6, 2], [2, 7, 1, 0, 2, 4], [7, 3, 3]]


EAGLE31 = {"fc_norm": True, "norm_before_fc": True, "norm_output": True, "aux_layers": (1, 2, 3, 4, 5)}


def pair(vocabulary: int, known: int, seed: int = 0, switches=(), **changes):
    """A random target and a random draft; with a small vocabulary they agree by chance often enough."""
    model = llama(seed, vocab_size=vocabulary, **changes)
    config = draft_config_for({**model.config.to_dict(), "model_type": "llama"})
    ids = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))[:known].sort().values
    t2d = torch.zeros(vocabulary, dtype=torch.bool)
    t2d[ids] = True
    config = replace(config, draft_vocab_size=known, **dict(switches))
    target = Target(model, config.aux_layers)
    draft = Eagle3Draft(config, t2d, ids - torch.arange(known))
    draft.initialise(seed, target)
    return target, draft


def job(proposals, limit, end=()):
    """What is decoded."""
    return Job("", "", "", {}, proposals, [], limit, list(end), 0.0, 0)


def own(target, prompts, limit, end=()):
    """The target's own replies."""
    return [reply.tokens for reply, _ in reference(target, prompts, job(1, limit, end))]


@pytest.mark.parametrize("proposals", [1, 3, 6])
@pytest.mark.parametrize("end", [(), (4,)])
def test_decodes_the_targets_own_tokens(proposals, end):
    target, draft = pair(vocabulary=8, known=6, seed=2)
    replies = decode(target, draft, PROMPTS, job(proposals, 40, end))
    assert [reply.tokens for reply in replies] == own(target, PROMPTS, 40, end)
    assert any(reply.accepted and max(reply.accepted) > 0 for reply in replies)


def test_a_batch_decodes_each_prompt_as_if_it_were_alone():
    target, draft = pair(vocabulary=12, known=12, seed=1)
    together = decode(target, draft, PROMPTS, job(4, 30, (5,)))
    assert together == [decode(target, draft, [prompt], job(4, 30, (5,)))[0] for prompt in PROMPTS]


HYBRID = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
WINDOW = {"sliding_window": 6}
HYBRIDS = {
    "MistralConfig": WINDOW, "Phi3Config": {**WINDOW, "pad_token_id": 0}, "Starcoder2Config": WINDOW,
    "MixtralConfig": {**WINDOW, "num_local_experts": 4}, "Qwen3NextConfig": HYBRID,
    "Qwen3MoeConfig": {**WINDOW, **HYBRID, "use_sliding_window": True},
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
def test_targets_with_sliding_windows_or_recurrent_layers_decode_their_own_tokens(name):
    import transformers

    torch.manual_seed(3)
    settings = {
        "vocab_size": 12, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": None, **HYBRIDS[name],
    }  # fmt: skip
    config = getattr(transformers, name)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    shape = draft_config_for(config.to_dict())
    target = Target(model, shape.aux_layers)
    draft = Eagle3Draft(shape, torch.ones(12, dtype=torch.bool), torch.zeros(12, dtype=torch.int64))
    draft.initialise(0, target)
    assert batch_size(target) == 1
    assert is_recurrent(target) == (name == "Qwen3NextConfig")
    for prompt in PROMPTS[1:3]:  # one shorter than the window, one longer
        (reply,) = decode(target, draft, [prompt], job(2, 10))
        assert [reply.tokens] == own(target, [prompt], 10)


def test_nothing_but_ends_and_lengths_comes_from_generation_config():
    from transformers import GenerationConfig

    odd = {
        "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": [0, 1, 2], "num_beams": 3,
        "return_dict_in_generate": True, "stop_strings": ["a"], "bad_words_ids": [[3]], "min_new_tokens": 30,
        "forced_eos_token_id": 1, "begin_suppress_tokens": [5], "sequence_bias": [[[6], 9.0]], "max_time": 1e-6,
        "encoder_repetition_penalty": 1.5, "guidance_scale": 3.0, "cache_implementation": "static", "eos_token_id": 3,
        "forced_bos_token_id": 2, "num_return_sequences": 2, "prompt_lookup_num_tokens": 3, "temperature": 9.0,
    }  # fmt: skip
    target, _ = pair(vocabulary=8, known=6, seed=2)
    expected = own(target, PROMPTS[:2], 12)
    given = target.model.generation_config = GenerationConfig()
    known = {name: value for name, value in vars(given).items() if not name.startswith("_")}
    assert known.keys() >= odd.keys()
    for name, value in known.items():
        setattr(given, name, odd.get(name, not value if isinstance(value, bool) else True))
    assert own(target, PROMPTS[:2], 12) == expected
    assert target.model.generation_config is given


@pytest.mark.parametrize("switches", [{}, EAGLE31], ids=["eagle3", "eagle3.1"])
def test_training_foresees_the_acceptance_length(switches):
    target, draft = pair(vocabulary=8, known=6, seed=2, switches=switches)
    replies = decode(target, draft, PROMPTS, job(3, 60))
    rows = [(torch.tensor(prompt + reply.tokens), len(prompt)) for prompt, reply in zip(PROMPTS, replies, strict=True)]
    batch = collate([(tokens, torch.arange(len(tokens)) >= start) for tokens, start in rows])
    objective = Objective(draft, target, 3, "sdpa", torch.float32, 80)
    sums = objective(batch, target.states(batch))[1]
    found = counts_of(replies, 3)
    assert found.accepted > 10
    assert sums.rounds[2] == pytest.approx(found.rounds, abs=len(PROMPTS))  # a reply's end cuts its last round
    assert sums.kept[2] == pytest.approx(found.accepted, abs=3 * len(PROMPTS))
    assert sums.acceptance_length(3) == pytest.approx(found.acceptance_length, abs=0.02)


def test_acceptance_counts_rounds_and_positions():
    found = counts_of([Reply(accepted=[0, 2, 3]), Reply(accepted=[1])], 3).plus(Counts(0, 0, 0, [0, 0, 0]))
    assert (found.rounds, found.drafted, found.accepted, found.acceptance_length) == (4, 12, 6, 1 + 6 / 4)
    assert found.report()["acceptance_by_position"] == [3 / 4, 2 / 4, 1 / 4]
    assert found.report()["conditional_acceptance_by_position"] == [3 / 4, 2 / 3, 1 / 2]
    assert Counts(2, 6, 0, [0, 0, 0]).report()["conditional_acceptance_by_position"] == [0, None, None]


def test_the_reference_says_by_how_much_each_token_was_the_best():
    target, _ = pair(vocabulary=8, known=6, seed=2)
    (reply, margins), *_ = reference(target, PROMPTS[:1], job(1, 5))
    for index, margin in enumerate(margins):
        tokens = torch.tensor([PROMPTS[0] + reply.tokens[:index]])
        best = target.model(tokens).logits[0, -1].topk(2)
        assert best.indices[0] == reply.tokens[index]
        assert float(best.values[0] - best.values[1]) == pytest.approx(margin, abs=1e-4)
