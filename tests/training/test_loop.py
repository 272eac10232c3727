"""The trainer against a loop of plain PyTorch: its clipping, optimizer and backward, a whole global batch at once."""

import threading
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draft_model.dataset import Split, load_vocabulary
from draft_model.drafts.batch import collate
from draft_model.drafts.eagle3.config import draft_config_for, with_overrides
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.drafts.eagle3.objective import Objective
from draft_model.target.model import Target, load_target
from draft_model.training import trainer
from draft_model.training.optimizer import learning_rate
from draft_model.training.order import plan_steps
from draft_model.training.plan import read_config
from training.case import DRAFT_VOCABULARY, QUICK

CPU = torch.device("cpu")
LONGEST_NORM = 0.02
"""So short that every step is clipped, each by another factor."""


def plain_loop(inputs, steps, momentum):
    """Weights after so many steps, by name, and the norm of each step's gradient."""
    split = Split(Path(inputs.dataset) / "train")
    shape = with_overrides(draft_config_for(read_config(inputs.model)), {"draft_vocab_size": DRAFT_VOCABULARY})
    target = load_target(Path(inputs.model), shape.aux_layers, torch.float32, CPU)
    draft = Eagle3Draft(shape, *load_vocabulary(Path(inputs.dataset)))
    draft.initialise(0, target)
    objective = Objective(draft, target, QUICK["ttt_length"], "sdpa", torch.float32, int(split.lengths.max()))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1.0, betas=(momentum, 0.999), weight_decay=0.0)
    norms = []
    for number, step in enumerate(islice(plan_steps(split.lengths, QUICK["draft_global_batch_size"], 0), steps)):
        rows = [split[int(index)] for index in step.conversations]
        batch = collate([(torch.from_numpy(row.input_ids), torch.from_numpy(row.loss_mask)) for row in rows])
        loss, sums = objective(batch, target.states(batch))
        optimizer.zero_grad()
        (loss / sums.supervised[0]).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(draft.parameters(), LONGEST_NORM)))
        rate = learning_rate(number, steps, QUICK["learning_rate"], QUICK["warmup_ratio"], 0.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return dict(draft.named_parameters()), norms


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_a_training_is_adamw_on_the_clipped_mean_gradient_of_each_global_batch(train, inputs, momentum):
    trained = train(max_grad_norm=LONGEST_NORM, momentum=momentum)
    weights, norms = plain_loop(inputs, trained.result.steps, momentum)
    assert min(norms) > LONGEST_NORM
    assert [record["grad_norm"] for record in trained.record["log"]] == pytest.approx(norms, rel=1e-4)
    state = load_file(f"{trained.output}/{trained.checkpoints[-1]}/training_state/state.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(state[f"weight.{name}"], weight.detach(), rtol=0, atol=1e-5, msg=name)


def test_the_target_runs_ahead_in_a_thread_and_no_number_changes(train, monkeypatch):
    ran, states = set(), Target.states
    monkeypatch.setattr(Target, "states", lambda *given: ran.add(threading.current_thread()) or states(*given))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ahead, thread = train(), ran.copy()
        monkeypatch.setattr(trainer, "_target_thread", lambda training: nullcontext())
        after_one_another = train()
    finally:
        torch.set_num_threads(threads)
    assert len(thread) == 1
    assert ran - thread == {threading.main_thread()}
    assert ahead.losses == after_one_another.losses
    assert ahead.validations == after_one_another.validations
    assert ahead.read("final/model.safetensors") == after_one_another.read("final/model.safetensors")


def test_the_weights_are_cast_once_a_step_and_once_a_validation(train, monkeypatch):
    casts, copy = [], torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda copies, weights: casts.append(len(weights)) or copy(copies, weights)
    )
    trained = train(compute_dtype="bfloat16", draft_micro_batch_size=1, total_steps=3)
    assert len(trained.losses) == 3
    assert len(trained.validations) == 1
    assert casts == [casts[0]] * 4
