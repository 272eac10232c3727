"""The arithmetic on paper against what is there: real parameters, bytes that autograd keeps, published counts."""

import gc
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

from draft_model import drafts
from draft_model.cli import cli
from draft_model.drafts.batch import collate
from draft_model.drafts.eagle3.config import draft_config_for
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.drafts.eagle3.objective import Objective
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters
from draft_model.target.model import Target
from draft_model.training import plan

DOCS = Path(__file__).parents[2] / "docs"
CLUSTER = plan.Cluster(memory=80e9, peak=989e12, share=0.4, network=50e9)
WORK = plan.Workload(tokens=1000, supervised=0.6)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.1-8b", 8.030), ("llama-3.3-70b", 70.554), ("qwen3-235b-a22b", 235.094)]
)
def test_parameters_are_the_published_ones(name, billions):
    sizes = plan.sizes_of(plan.read_config(str(DOCS / f"targets/{name}.json")))
    assert (sizes.layers + sizes.whole) / 1e9 == pytest.approx(billions, abs=6e-4)


def test_of_a_mixture_of_experts_only_the_chosen_ones_cost_time():
    sizes = plan.sizes_of(plan.read_config(str(DOCS / "targets/qwen3-235b-a22b.json")))
    head = 151_936 * 4096
    assert (sizes.active + head) / 1e9 == pytest.approx(22, abs=0.6)  # A22B


def pair(**changes):
    """A random target and its draft."""
    config = tiny.llama_config(**changes)
    model = tiny.llama(**changes)
    draft = replace(draft_config_for(config.to_dict()), draft_vocab_size=48)
    t2d = torch.arange(config.vocab_size) < 48
    return Target(model, draft.aux_layers), Eagle3Draft(draft, t2d, torch.zeros(48, dtype=torch.int64))


def test_a_drafts_parameters_are_counted_right():
    _, draft = pair()
    assert drafts.family("eagle3").costs(draft.config, 7).parameters == sum(
        parameter.numel() for parameter in draft.parameters()
    )


@pytest.fixture
def only_new_objects():
    """The garbage collector sees nothing that other tests left: it looks through millions of objects otherwise."""
    gc.freeze()
    yield
    gc.unfreeze()


def alive():
    """Bytes of every tensor's storage that Python holds, by its address."""
    gc.collect()
    # Plain ones: torch.compile in other tests leaves fake tensors, which have no storage.
    tensors = (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize(
    ("changes", "tokens", "steps"),
    [
        ({"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}, 200, 7),
        ({"hidden_size": 128, "intermediate_size": 192, "head_dim": 16}, 120, 4),
        ({"hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 8}, 120, 7),
    ],
)
def test_activations_are_about_those_that_autograd_keeps(changes, tokens, steps):
    target, draft = pair(**changes)
    objective = Objective(draft, target, steps, "sdpa", torch.float32, tokens)
    batch = collate([(torch.arange(tokens) % 60, torch.ones(tokens, dtype=torch.bool))])
    states = target.states(batch)
    before = alive()
    _loss, _ = objective(batch, states)
    kept = sum(size for pointer, size in alive().items() if pointer not in before)
    costs = drafts.family("eagle3").costs(draft.config, steps)
    expected = 4 * tokens * (costs.token_numbers + costs.row_numbers(4 * tokens, math.inf))
    weights = 4 * sum(parameter.numel() for parameter in draft.parameters())  # copies in the compute type
    assert 0.75 * expected < kept < 1.35 * expected + weights


def planned(name, gpus=1, cluster=CLUSTER, work=WORK, **parameters):
    """The plan for a target of docs/targets."""
    config = plan.read_config(str(DOCS / f"targets/{name}.json"))
    p = Parameters(number_of_gpu_to_use_draft_model_training=gpus, **parameters)
    return plan.make_plan(config, plan.draft_of(config, p), p, cluster, work)


def test_a_target_in_parts_needs_less_of_each_gpu_and_the_rest_stays():
    made = {tp: planned("llama-3.3-70b", 8, tp_size=tp) for tp in (4, 8)}
    assert made[4].memory["target, layers / tp_size"] == 2 * made[8].memory["target, layers / tp_size"]
    assert made[4].memory["target, embedding and head"] == made[8].memory["target, embedding and head"]
    assert made[8].fits
    assert made[8].gathered == 0


def test_copies_that_do_not_fit_are_spread_at_the_price_of_the_network():
    sizes = {"draft_global_batch_size": 32, "training_batch_size": 2}
    spread, alone = (planned("llama-3.3-70b", gpus, **sizes) for gpus in (8, 1))
    assert (spread.fits, alone.fits) == (True, False)
    layers = alone.memory["target, layers / tp_size"]
    assert spread.memory["target, layers / (tp_size x dp_size)"] == layers / 8
    assert spread.memory["target, gathered"] == pytest.approx(2 * layers / 80)
    assert spread.gathered == pytest.approx(2 * layers * 7 / 8)  # 32 conversations: two passes of each GPU
    assert (spread.tensor_parallel, alone.gathered) == (0, 0)
    assert any("FSDP" in value for _, value in plan.rows_of(spread, Parameters(**sizes), CLUSTER))


def test_twice_the_gpus_are_twice_as_fast_on_paper_and_nothing_is_sent_by_one():
    one, two = (planned("llama-3.1-8b", gpus) for gpus in (1, 2))
    assert one.seconds_per_million == pytest.approx(2 * two.seconds_per_million)
    assert one.reduction == 0
    draft = draft_config_for(plan.read_config(str(DOCS / "targets/llama-3.1-8b.json")))
    assert two.reduction == pytest.approx(4 * drafts.family("eagle3").costs(draft, 7).parameters)


RECOMMENDED = (  # target, GPUs, tp_size, training_batch_size, draft_micro_batch_size, draft_global_batch_size
    ("llama-3.1-8b", 1, 1, 1, 1, 8), ("llama-3.1-8b", 8, 1, 2, 2, 64), ("llama-3.1-8b", 8, 1, 8, 8, 64),
    ("llama-3.3-70b", 8, 2, 4, 1, 64), ("llama-3.3-70b", 8, 4, 1, 1, 64), ("llama-3.3-70b", 8, 8, 2, 2, 64),
    ("qwen3-235b-a22b", 4, 4, 1, 1, 64), ("qwen3-235b-a22b", 8, 4, 4, 1, 64), ("qwen3-235b-a22b", 16, 4, 8, 2, 64),
)  # fmt: skip


def of_memory(made, *names):
    return sum(size for name, size in made.memory.items() if name.startswith(names))


def row_of(name, *layout):
    """A line of the table in docs/scaling.md."""
    gpus, tp, at_once, micro, batch = layout
    made = planned(
        name, gpus, tp_size=tp, draft_micro_batch_size=micro, training_batch_size=at_once, draft_global_batch_size=batch
    )
    target = of_memory(made, "target, layers", "target, gathered", "target, embedding")
    draft, total = of_memory(made, "draft, weights"), sum(made.memory.values())
    words = plan.bytes_in_words
    cells = [
        name, *layout, words(target) + (", spread" if made.gathered else ""), words(draft),
        words(total - target - draft), f"**{words(total)}**" if made.fits else f"{words(total)}, too much",
        f"{1e6 / made.step_tokens * made.step_seconds:.0f} s",
        *map(words, (made.reduction, made.gathered, made.checkpoint)),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


def test_the_table_of_the_documentation_is_what_is_computed():
    text = (DOCS / "scaling.md").read_text()
    shown = text.partition("<!-- table -->\n")[2].partition("<!-- end -->")[0].splitlines(keepends=True)[2:]
    assert shown == [row_of(*row) for row in RECOMMENDED]


def test_a_target_of_a_shorter_context_is_told():
    config = {"max_position_embeddings": 1024}
    assert plan.context_problem(config, 1024) == plan.context_problem({}, 9999) == ""
    told = "max_length: given 2048, but the target's max_position_embeddings is 1024"
    assert plan.context_problem({"text_config": config}, 2048).startswith(told)


def test_a_configuration_that_is_none_is_told(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DraftModelError, match="no JSON object"):
        plan.read_config(str(tmp_path))
    with pytest.raises(DraftModelError, match="builds no text-generation model"):
        plan.sizes_of({"model_type": "nothing"})
    with pytest.raises(DraftModelError, match="builds no text-generation model"):
        plan.sizes_of({"model_type": "llama", "num_attention_heads": 0})
    with pytest.raises(DraftModelError, match=r"config\.json"):
        plan.read_config(str(tmp_path / "nowhere"))


def test_the_command_prints_the_plan(tmp_path):
    tiny.llama_config().save_pretrained(tmp_path)
    told = CliRunner().invoke(cli, ["plan", "--config", str(tmp_path), "--max-length", "256"])
    assert told.exit_code == 0, told.output
    for name in ("memory of each GPU", "time", "gradients", "object store"):
        assert name in told.output
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 32
    assert "ttt_length=3" in told.output
    (tmp_path / "draft.json").write_text('{"block_size": 7}')
    block = ["--draft-architecture", "dspark", "--draft-model-config", str(tmp_path / "draft.json")]
    told = CliRunner().invoke(cli, ["plan", "--config", str(tmp_path), *block])
    assert "blocks of 7" in " ".join(told.output.split())
    assert "ttt_length=" not in told.output
    told = CliRunner().invoke(cli, ["plan", "--config", str(tmp_path), *block, "--num-speculative-tokens", "8"])
    assert str(told.exception).startswith("num_speculative_tokens: given 8")


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ("1", "the evaluation needs 144.6 GB (target 141.1, draft 2.8, keys and values of 2176 tokens 0.7)"),
        ("2", "the evaluation needs 145.0 GB"),
        ("0", "fits on 8 GPUs of 80 GB"),
    ],
)
def test_it_says_whether_the_evaluations_gpus_hold_the_target(gpus, expected):
    config = str(DOCS / "targets/llama-3.3-70b.json")
    size = ["--number_of_gpu_to_use_draft_model_training", "8", "--number_of_gpu_to_use_evaluation", gpus]
    longer = ["--evaluation_max_new_tokens", "1280"] if gpus == "2" else []
    told = CliRunner().invoke(cli, ["plan", "--config", config, *size, *longer], env={"COLUMNS": "400"}).output
    assert expected in " ".join(told.replace("│", " ").split())


def test_a_conversation_of_32_k_tokens_fits_80_gb_since_gate_and_up_are_computed_again():
    made, roomy = (
        planned("llama-3.1-8b", cluster=replace(CLUSTER, memory=memory), work=plan.Workload(32768, 1.0),
                max_length=32768, training_batch_size=1)
        for memory in (80e9, 160e9)
    )  # fmt: skip
    assert made.fits
    both = 7 * 2 * 14336 * 2 * 32768  # steps, gate and up, width, bytes, tokens
    assert both > 80e9 / 8
    name = "draft, activations of a micro-batch"
    assert roomy.memory[name] - made.memory[name] == pytest.approx(both)


@pytest.mark.parametrize(
    ("tokens", "own", "lengths"),
    [
        (41_500, True, [1.33, 1.48, 1.59]),  # benchmarks/recipe.py, 160 conversations: AdamW, Muon, momentum 0.5
        (102_000, True, [1.60, 1.72, 1.85]),  # 400 conversations, likewise
        (105_000, True, [1.92]),  # 720 conversations, 192 tokens of each
        (212_000, True, [1.95, 2.06]),  # the demo, decoded and simulated
        (102_000 * 2, True, [1.66]),  # the demo of 391 conversations, two epochs
        (408_000, True, [1.82]),  # 1,564 conversations, one epoch
        (2_500_000, True, [1.89]),  # speculators #751 and the like: 5,000 conversations
        (2_500_000, False, [1.45, 1.49]),
        (250_000_000, True, [2.26, 2.56, 2.60]),  # vLLM's regression tests of published drafts
    ],
)
def test_the_range_holds_what_was_measured(tokens, own, lengths):
    low, high = plan.expected_acceptance_length(tokens, 3, own)
    assert all(low <= length <= high for length in lengths)
    assert high - low < 0.7


@pytest.mark.parametrize("own", [True, False])
def test_more_tokens_and_more_proposals_promise_more_and_never_more_than_is_proposed(own):
    for proposals in (1, 3, 7):
        ranges = [plan.expected_acceptance_length(10**power, proposals, own) for power in range(13)]
        assert all(1 <= low < high < proposals + 1 for low, high in ranges)
        assert all(before <= after for before, after in pairwise(ranges))
        assert ranges[6] < plan.expected_acceptance_length(10**6, proposals + 1, own)


def test_the_plan_says_what_to_expect_and_what_to_change():
    command = ["plan", "--config", str(DOCS / "targets/llama-3.1-8b.json"), "--tokens", "500", "--supervised", "0.5"]
    few, many = (
        CliRunner().invoke(cli, [*command, "--conversations", count, *more]).output
        for count, more in (("2000", []), ("400000", ["--draft_optimizer", "muon", "--num_epochs", "1"]))
    )
    assert "after 1 M supervised tokens" in few
    assert "after 100 M" in many
    assert "draft_optimizer=muon" in few
    assert "max_length=192" in few
    assert "draft_optimizer=muon" not in many


@pytest.mark.parametrize(("family", "said"), [("eagle3.1", ""), ("dspark", " (EAGLE-3's; DSpark starts lower)")])
def test_what_is_expected_of_a_block_draft_is_said_to_be_eagle_3s(family, said):
    assert plan.expectation(1e6, 3, family).partition("others wrote them")[2] == said
