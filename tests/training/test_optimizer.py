"""Muon beside PyTorch's own, and checkpoints of it."""

import pytest
import tiny
import torch

from draft_model.drafts import family
from draft_model.errors import DraftModelError
from draft_model.training.optimizer import MOMENTUM, RATIO, make_optimizer
from training.test_resume import interrupted_at


def make_draft():
    shape = family().default_shape(tiny.llama_config().to_dict())
    torch.manual_seed(0)
    return family().create(shape, torch.ones(shape.vocab_size, dtype=torch.bool), torch.zeros(shape.draft_vocab_size))


def test_draft_optimizer_muon_is_pytorchs_muon_for_the_layer_and_adamw_for_head_and_norms():
    ours, theirs = make_draft(), make_draft()
    named = dict(theirs.named_parameters())
    matrices = {name: p for name, p in named.items() if p.dim() == 2 and name != "lm_head.weight"}
    assert matrices.keys() >= {"fc.weight", "midlayer.self_attn.q_proj.weight", "midlayer.mlp.down_proj.weight"}
    rest = [p for name, p in named.items() if name not in matrices]
    references = (
        torch.optim.Muon(
            [*matrices.values()], lr=RATIO * 1e-3, momentum=MOMENTUM, weight_decay=0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=1e-3, weight_decay=0),
    )
    optimizer = make_optimizer("muon", ours, 1e-3)
    generator = torch.Generator().manual_seed(1)
    for scale, useful in ((4.0, True), (2.0, False), (8.0, True)):
        for name, parameter in ours.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient * scale if useful else torch.full_like(gradient, torch.nan)
            named[name].grad = gradient
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(not useful))
        optimizer.step()
        for reference in references if useful else ():
            reference.step()
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, named[name], rtol=1e-5, atol=1e-6, msg=name)


def test_muon_resumes_to_the_bit_and_not_with_the_other_optimizer(train):
    muon = {"draft_optimizer": "muon"}
    whole, output = train(**muon), interrupted_at(train, 5, **muon)
    with pytest.raises(DraftModelError, match=r"draft_optimizer: the training in .* used the other optimizer"):
        train(output, resume="true")
    resumed = train(output, resume="true", **muon)
    assert resumed.losses == whole.losses != train().losses
    assert resumed.read("final/model.safetensors") == whole.read("final/model.safetensors")
