"""Losses and gradients that are no numbers: skipped and counted, and told where they do not stop."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draft_model.dataset.tokens import Split
from draft_model.errors import DraftModelError
from draft_model.training.order import plan_steps
from training.case import QUICK, with_weight


@pytest.fixture
def poisoned(inputs, tmp_path):
    """The target with the largest embedding of a token that one training conversation alone has; and which."""
    split = Split(Path(inputs.dataset) / "train")
    validation = Split(Path(inputs.dataset) / "validation")
    known = {int(token) for row in validation for token in row.input_ids}
    users = Counter(token for row in split for token in {int(token) for token in row.input_ids})
    token = next(token for token, count in users.items() if count == 1 and token not in known)
    (index,) = (i for i, row in enumerate(split) if token in row.input_ids)
    # Finite, but its gradient is not.
    return with_weight(inputs.model, tmp_path / "poisoned", "model.embed_tokens.weight", token, 3e38), split, index


def test_a_step_without_a_finite_loss_is_skipped_and_counted(train, poisoned, caplog):
    model, split, index = poisoned
    trained = train(model=model)
    plan = list(islice(plan_steps(split.lengths, QUICK["draft_global_batch_size"], 0), 13))
    bad = [number for number, step in enumerate(plan, 1) if index in step.conversations]
    assert bad
    assert [split.line(index) for index in range(len(split))] == list(range(1, len(split) + 1))
    assert [record["step"] for record in trained.record["skipped"]] == bad
    for record in trained.record["skipped"]:
        assert split.line(index) in record["lines"]
        assert len(record["lines"]) == 4
    assert caplog.text.count("is skipped (") == len(bad)
    assert not set(bad) & trained.losses.keys()
    assert len(trained.losses) >= 13 - len(bad) - 2
    tensors = load_file(f"{trained.result.final}/model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())
    # Resuming counts on from there.
    again = train(trained.output, model=model, resume="true")
    assert again.record["skipped"] == trained.record["skipped"]


def test_losses_that_are_no_numbers_again_and_again_end_the_training(train, inputs, plain):
    split = Split(Path(inputs.dataset) / "train")
    with pytest.raises(DraftModelError) as caught:
        train(learning_rate=1e30, warmup_ratio=0.0)
    (told,) = caught.value.problems
    first = next(int(word) for word in told.split() if word.isdigit())
    plan = list(islice(plan_steps(split.lengths, 4, 0), first + 4))
    lines = sorted(split.line(int(index)) for index in plan[-1].conversations)
    assert told.startswith(f"training: steps {first} to {first + 4} had no finite loss and gradient")
    assert f"lines {lines}" in told
    assert "lower learning_rate" in told
