"""However many processes train, and however they share the target, the training is the same."""

import json
import os
import shutil
import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from draft_model.drafts.batch import collate
from draft_model.errors import DraftModelError
from draft_model.ranks import PeerLost, start_ranks
from draft_model.target import parallel
from draft_model.target.model import load_target
from draft_model.target.parallel import check_experts, check_heads, load_share, must_spread, plan_for
from training.case import Trainer
from training.processes import free_port, outcome, run_world, start, train_in

pytestmark = pytest.mark.timeout(600)

STEPS = {"total_steps": 12, "num_epochs": 4, "draft_micro_batch_size": 1}
LAYOUTS = {
    "tp2": (2, 2),
    "dp2, spread": (2, 1),
    "dp4": (4, 1),
    "tp2 x dp2": (4, 2),
    "tp2 x dp2, spread": (4, 2),
}
"""Processes and tp_size; tests/jobs/test_local.py has dp2. Spread: no copy of the target fits beside the draft, so FSDP
spreads its layers over dp."""
FAMILIES = ("llama", "qwen3", "phi3", "hunyuan_v1_dense", "qwen3_moe", "gpt_oss")
"""The last two have experts. hunyuan has no plan of its own in transformers, and gpt_oss none for its attention."""


@pytest.fixture(scope="module")
def worlds(inputs, tmp_path_factory):
    """Twelve steps by one process and by every layout of two and four; what four began, two went on with."""
    folder = tmp_path_factory.mktemp("worlds")
    train = Trainer(inputs, folder)
    configs = {
        name: train.config(number_of_gpu_to_use_draft_model_training=world, tp_size=tp, **STEPS)
        for name, (world, tp) in LAYOUTS.items()
    }
    begun = train.config(number_of_gpu_to_use_draft_model_training=4, **STEPS)
    logs = {world: folder / f"{world}.log" for world in (2, 4)}
    of_two, of_four = ([name for name, layout in LAYOUTS.items() if layout[0] == world] for world in (2, 4))
    spread_of_two, spread_of_four = (
        tuple(number for number, name in enumerate(names) if "spread" in name) for names in (of_two, of_four)
    )
    codes = train_in(4, *(configs[name] for name in of_four), begun, stop_at="step 4, ", log=logs[4],
                     small=spread_of_four)  # fmt: skip
    assert codes == [143] * 4, logs[4].read_text()
    shutil.copytree(begun.output, folder / "begun")
    resumed = train.config(begun.output, number_of_gpu_to_use_draft_model_training=2, tp_size=2, resume="true", **STEPS)
    codes = train_in(2, *(configs[name] for name in of_two), resumed, log=logs[2], small=spread_of_two)
    assert codes == [0] * 2, logs[2].read_text()
    alone = train(**STEPS)
    trained = {name: outcome(config) for name, config in configs.items()}
    return trained | {"alone": alone, "resumed": outcome(resumed), "logs": logs, "begun": folder / "begun"}


def assert_same(trained, other):
    assert list(trained.losses) == list(other.losses)
    assert max(trained.losses) == 12
    for part in ("log", "validation"):
        losses = [np.array([record["loss"] for record in run.record[part]], float) for run in (trained, other)]
        np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    last = trained.checkpoints[-1]
    ours, others = (load_file(f"{run.output}/{last}/training_state/state.safetensors") for run in (trained, other))
    for name, tensor in others.items():
        if name.startswith("weight."):
            np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_losses_and_weights_of_one_process(worlds, layout):
    assert_same(worlds[layout], worlds["alone"])
    assert worlds[layout].record["world_size"] == LAYOUTS[layout][0]


def test_the_log_says_that_copies_would_not_fit(worlds):
    for world in (2, 4):
        told = "copies would not fit beside the draft, so their layers are spread over 2 (FSDP)"
        assert worlds["logs"][world].read_text().count(told) == 1


def test_what_four_processes_began_two_finish(worlds):
    position = json.loads((worlds["begun"] / "step_4/training_state/position.json").read_text())
    assert (position["step"], position["world"]) == (4, 4)
    assert_same(worlds["resumed"], worlds["alone"])


def test_what_four_began_and_two_went_on_with_one_finishes(worlds, train, tmp_path):
    output = shutil.copytree(worlds["resumed"].output, tmp_path / "resumed")
    names = json.loads((output / "checkpoints.json").read_text())
    positions = {name: json.loads((output / name / "training_state/position.json").read_text()) for name in names}
    assert positions["step_4"]["world"] == 4
    of_two = [name for name in names if positions[name]["world"] == 2]
    assert len(of_two) > 2
    (output / "checkpoints.json").write_text(json.dumps(names[: names.index(of_two[1]) + 1]))
    assert_same(train(str(output), resume="true", **STEPS), worlds["alone"])


def test_the_first_lines_say_how_the_work_is_shared_out(worlds):
    log = worlds["logs"][4].read_text()
    assert "4 process(es)" in log
    assert "tensor parallel 2, data parallel 2" in log
    assert "4 conversations per step = 4 processes x micro-batch 1 x accumulation 1, about " in log
    assert "3.2 steps per epoch, 12 steps in all" in log


def states_of_families(folders, output, tp):
    """In one of the processes: the states that its share of each target gives."""
    torch.set_num_threads(1)
    if tp == 1:
        parallel.memory_of = lambda device: 1e9
    with start_ranks(timedelta(minutes=1), tp=tp) as ranks:
        for folder in folders:
            target = load_share(folder, (1, 3, 5), torch.float32, ranks, lambda _: 2e9)
            states = torch.cat(target.states(conversations()))
            held = sum(parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()
                       for parameter in target.model.parameters())  # fmt: skip
            found = {"states": states, "logits": target.logits(states[:, -32:]), "held": torch.tensor(held)}
            last = {name: tensor for name, tensor in target.last_layer.items() if tensor.dim() < 3}
            torch.save(found | last, output / f"{folder.name}.{ranks.rank}")


def conversations():
    random = torch.Generator().manual_seed(0)
    return collate(
        [(torch.randint(0, 64, (n,), generator=random), torch.ones(n, dtype=torch.bool)) for n in (20, 13, 7)]
    )


def write_family(folder, family):
    from transformers import AutoConfig, AutoModelForCausalLM

    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    settings = tiny.llama_config().to_dict() | (experts if family in ("qwen3_moe", "gpt_oss") else {})
    kept = {name: settings[name] for name in settings if name not in ("model_type", "rope_parameters", "architectures")}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **kept)).save_pretrained(folder)


@pytest.mark.parametrize(("world", "tp"), [(2, 2), (2, 1), (3, 1)])  # cut in two; spread by FSDP, evenly and not
def test_a_target_in_parts_gives_the_states_of_a_whole_one(tmp_path, world, tp):
    families = FAMILIES[:4] if world == 3 else FAMILIES  # four experts are none for the last of three
    for family in families:
        write_family(tmp_path / family, family)
    codes = run_world(world, states_of_families, [tmp_path / family for family in families], tmp_path, tp,
                      log=tmp_path / "log")  # fmt: skip
    assert codes == [0] * world, (tmp_path / "log").read_text()
    for family in families:
        whole = load_target(tmp_path / family, (1, 3, 5), torch.float32, torch.device("cpu"))
        states = torch.cat(whole.states(conversations()))
        size = sum(parameter.numel() for parameter in whole.model.parameters())
        for rank in range(world):
            part = torch.load(tmp_path / f"{family}.{rank}")
            torch.testing.assert_close(part["states"], states, rtol=0, atol=1e-5, msg=lambda text, f=family: f + text)
            torch.testing.assert_close(part["logits"], whole.logits(states[:, -32:]), rtol=0, atol=1e-5)
            for name, tensor in whole.last_layer.items():
                if tensor.dim() < 3:
                    assert torch.equal(part[name], tensor), (family, name)
            assert part["held"] < 0.75 * size  # embedding and head are whole in all


def test_a_target_is_not_spread_so_far_that_a_process_has_no_expert(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    for family, tp, fits, too_far in (
        ("qwen3_moe", 2, (2, 4), (3, 5)),
        ("gpt_oss", 2, (2,), (3, 4)),
        ("llama", 1, (9,), ()),
    ):
        write_family(tmp_path / family, family)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / family))
        for dp in fits:
            check_experts(model, tp, dp)
        for dp in too_far:
            with pytest.raises(DraftModelError, match=rf"tp_size: given {tp}; .* experts .* over {dp} data-parallel"):
                check_experts(model, tp, dp)


def test_a_tp_size_that_would_cut_a_head_in_two_is_refused_with_those_that_fit():
    check_heads(tiny.llama_config(), 2)
    with pytest.raises(DraftModelError, match=r"tp_size: given 4; .*4 attention heads and 2 key-value.*allowed: 1, 2$"):
        check_heads(tiny.llama_config(), 4)


def test_a_target_too_big_for_a_gpu_is_spread_or_refused_with_the_tp_size_that_does():
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(tiny.llama_config(num_key_value_heads=4))
    layers = 4 * sum(parameter.numel() for parameter in model.model.layers.parameters())
    rest = 4 * sum(parameter.numel() for parameter in model.parameters()) - layers
    assert not must_spread(model, 2, 4, rest + layers // 2, 0)
    assert must_spread(model, 2, 4, rest + layers // 2, 1)
    assert must_spread(model, 1, 4, rest + layers * 2 // 3, 0)  # a quarter, and two of six layers
    assert not must_spread(model, 2, 1, rest + layers // 2, 1)  # nobody to share with, and what is beside is a guess
    with pytest.raises(DraftModelError, match=r"tp_size: given 1; .*: use 4 or more"):
        must_spread(model, 1, 1, rest + layers // 3, 0)
    with pytest.raises(DraftModelError, match=r"tp_size: given 2; .*no tp_size .* use larger or more GPUs"):
        must_spread(model, 2, 4, rest + layers // 5, 0)


def test_a_family_without_a_plan_and_with_other_names_is_refused():
    from transformers import PersimmonConfig, PersimmonForCausalLM

    with torch.device("meta"):
        model = PersimmonForCausalLM(
            PersimmonConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=8, intermediate_size=8)
        )
    with pytest.raises(
        DraftModelError, match=r"no tensor-parallel plan for PersimmonForCausalLM.*self_attn\.q_proj.*use 1"
    ):
        plan_for(model)


def train_with_a_failing_one(config, failing, killed):
    from draft_model.training import job, trainer

    os.environ["DRAFT_MODEL_JOB"] = config
    original, job._OTHERS_FIRST = trainer._learn, 0.0

    def learn(training, *arguments):
        if training.ranks.rank == failing and training.done == 3:
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the disk caught fire")
        return original(training, *arguments)

    trainer._learn = learn
    return job.main()


@pytest.mark.parametrize("killed", [False, True])
def test_the_log_of_a_dying_process_comes_before_those_of_the_others(train, tmp_path, killed):
    config = train.config(number_of_gpu_to_use_draft_model_training=3, draft_global_batch_size=3,
                          draft_micro_batch_size=1)  # fmt: skip
    log = tmp_path / "log"
    codes = run_world(3, train_with_a_failing_one, config.to_json(), 1, killed, log=log)
    assert codes == [1, -signal.SIGKILL if killed else 1, 1]
    lines = log.read_text().splitlines()
    others = [number for number, line in enumerate(lines) if "ends, for another one is gone" in line]
    assert len(others) == 2
    assert sum("Traceback" in line for line in lines) == (not killed)
    if not killed:
        first = next(number for number, line in enumerate(lines) if "process 1 of 3 fails:" in line)
        told = next(number for number, line in enumerate(lines) if "the disk caught fire" in line)
        assert first < told < min(others)


def wait_for_a_silent_one(timeout):
    try:
        with start_ranks(timedelta(seconds=timeout)) as ranks:
            if ranks.rank == 1:
                time.sleep(60)  # does not come; the other's end is what the parent waits for
            ranks.any(False)
    except PeerLost:
        return 3
    return 0


def test_a_process_that_does_not_come_ends_the_others_within_the_time_out(tmp_path):
    port = free_port()
    waiting, silent = (
        start(wait_for_a_silent_one, 2, log=tmp_path / "log", rank=rank, world=2, port=port) for rank in (0, 1)
    )
    waiting.join()
    silent.kill()
    silent.join()
    assert waiting.exitcode == 3
