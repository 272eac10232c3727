"""Trees and sampling: a tree changes no greedy token, and sampled tokens keep the target's distribution."""

import itertools

import pytest
import torch
from test_speculative import PROMPTS, pair

from draft_model.evaluation import accept
from draft_model.evaluation.speculative import Sampling, SpeculativeDecoder, greedy_replies
from draft_model.evaluation.tree import DraftTree
from draft_model.parameters.rules import problems_with

VOCABULARY = 5
SEQUENCES = list(itertools.product(range(VOCABULARY), repeat=3))
TEMPERATURE = 1.5


def test_a_tree_lists_its_nodes_level_by_level():
    tree = DraftTree.parse("2,1,2")
    assert tree.parents == (0, 0, 1, 2, 3, 3, 4, 4)
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert tree.children.tolist()[:5] == [[1, 2], [3, -1], [4, -1], [5, 6], [7, 8]]
    assert [node for node in range(9) if tree.sees[7, node]] == [0, 2, 4, 7]


@pytest.mark.parametrize("text", ["0", "2,-1", "a", "9,9", "2,,1"])
def test_a_tree_that_is_none_is_refused(text):
    assert [problem.partition(":")[0] for problem in problems_with({"evaluation_tree": text}, ["evaluate"])] == [
        "evaluation_tree"
    ]


@pytest.mark.parametrize("widths", [(3,), (2, 2), (3, 2, 1), (1, 3, 2)])
@pytest.mark.parametrize("end", [(), (4,)])
def test_a_tree_decodes_the_targets_own_tokens(widths, end):
    target, draft = pair(vocabulary=8, known=6, seed=2)
    expected = greedy_replies(target, PROMPTS, 40, end)
    replies = SpeculativeDecoder(target, draft, DraftTree(widths), end).decode(PROMPTS, 40)
    assert [reply.tokens for reply in replies] == expected
    deepest = max(count for reply in replies for count in reply.accepted)
    assert deepest == len(widths) or (end and deepest > 0)


def test_a_tree_keeps_more_than_its_first_branch():
    target, draft = pair(vocabulary=8, known=6, seed=2)

    def accepted(widths):
        replies = SpeculativeDecoder(target, draft, DraftTree(widths), ()).decode(PROMPTS, 60)
        counts = [count for reply in replies for count in reply.accepted]
        return sum(counts) / len(counts)

    assert accepted((3, 2)) > accepted((1, 1)) + 0.2


@torch.no_grad()
def exact_distribution(target, prompt):
    """Probability of each three-token reply by the target alone, float64 [V^3]."""
    rows = torch.tensor([[*prompt, *sequence] for sequence in SEQUENCES])
    final = target.decoder(input_ids=rows, use_cache=False).last_hidden_state
    log = (target.logits(final).double() / TEMPERATURE).log_softmax(-1)
    first = len(prompt)
    return sum(log[range(len(rows)), first - 1 + k, rows[:, first + k]] for k in range(3)).exp()


def p_value(counts, expected):
    """Of a chi-square test; cells that are expected less than five times are one."""
    rare = expected < 5
    counts, expected = (torch.cat((x[~rare], x[rare].sum(0, keepdim=True))) for x in (counts, expected))
    statistic = ((counts - expected).square() / expected.clamp_min(1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), statistic / 2))


def p_of_samples(widths, repeats=6):
    """How likely the decoder's samples are under the target's distribution."""
    target, draft = pair(vocabulary=VOCABULARY, known=4, seed=6)
    prompt, size = [1, 3, 2], 1000
    decoder = SpeculativeDecoder(target, draft, DraftTree(widths), (), Sampling(TEMPERATURE, 11))
    counts, kept = torch.zeros(len(SEQUENCES), dtype=torch.float64), 0
    for _ in range(repeats):
        replies = decoder.decode([prompt] * size, 3)
        index = [SEQUENCES.index(tuple(reply.tokens)) for reply in replies]
        counts += torch.bincount(torch.tensor(index), minlength=len(SEQUENCES))
        kept += sum(sum(reply.accepted) for reply in replies)
    assert kept > size, "proposals are kept, or nothing was tested"
    return p_value(counts, exact_distribution(target, prompt) * counts.sum())


@pytest.mark.parametrize("widths", [(1, 1), (2, 2), (4,)])
def test_sampling_keeps_the_targets_distribution(widths):
    assert p_of_samples(widths) > 1e-3


def p_of_walks(rows=20_000):
    """The same of the rule alone, held against a target and a draft that differ much."""
    tree, generator = DraftTree((3, 2)), torch.Generator().manual_seed(5)
    p = torch.rand(tree.size, 6, generator=generator).pow(3).expand(rows, -1, -1)
    q = torch.rand(tree.levels[-1].start, 6, generator=generator).pow(3).expand(rows, -1, -1)
    p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
    first = accept.draw(q[:, 0], 3, generator)
    second = accept.draw(q[:, 1:], 2, generator).flatten(1)
    tokens = torch.cat((torch.zeros(rows, 1, dtype=torch.int64), first, second), 1)
    walk = accept.walk_sampled(tree, tokens, p, q, generator)
    one = torch.where(walk.accepted > 0, tokens.gather(1, walk.path[:, 1:2])[:, 0], walk.last)
    return p_value(torch.bincount(one, minlength=6).double(), p[0, 0].double() * rows)


def test_the_rule_keeps_the_targets_distribution():
    assert p_of_walks() > 1e-3


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        ("keeps", lambda p, q, chance: chance < p),
        ("keeps", lambda p, q, chance: p > 0),
        ("remainder", lambda p, q: p),
        ("without", lambda q, token: q),
    ],
    ids=["too few kept", "all kept", "resampled from p", "drawn with replacement"],
)
def test_a_wrong_rule_fails_the_same_test(monkeypatch, rule, wrong):
    monkeypatch.setattr(accept, rule, wrong)
    assert p_of_walks() < 1e-6


def test_a_wrong_rule_shows_in_what_is_decoded(monkeypatch):
    monkeypatch.setattr(accept, "keeps", lambda p, q, chance: p > 0)
    assert p_of_samples((2, 2)) < 1e-6


def test_the_same_seed_samples_the_same_replies():
    target, draft = pair(vocabulary=8, known=6, seed=2)

    def replies(seed):
        return SpeculativeDecoder(target, draft, DraftTree((2, 1)), (), Sampling(1.0, seed)).decode(PROMPTS, 20)

    assert replies(3) == replies(3)
    assert replies(3) != replies(4)
