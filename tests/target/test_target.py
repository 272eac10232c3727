"""The target's features, final states and logits are transformers' own, for every family, padded or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drafts.eagle3.families import FAMILIES, HIDDEN, LAYERS, SHAPE, VOCAB, save_target

from draft_model.drafts.batch import Batch, collate
from draft_model.drafts.eagle3.config import DraftConfig, draft_config_for
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.drafts.eagle3.objective import Objective
from draft_model.errors import DraftModelError
from draft_model.target.model import Target, load_target

LENGTHS = (19, 11, 5)  # longer than the families' sliding windows, and not


class Family:
    """A saved target, loaded by the code under test, and transformers' own model of the same folder."""

    def __init__(self, folder: Path, name: str) -> None:
        from transformers import AutoModelForCausalLM

        save_target(folder, name)
        self.folder = folder
        self.config: DraftConfig = draft_config_for(json.loads((folder / "config.json").read_text()))
        self.target: Target = load_target(folder, self.config.aux_layers, torch.float32, torch.device("cpu"))
        self.plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        self.tokens = [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]

    def batch(self) -> Batch:
        return collate([(ids, torch.ones(len(ids), dtype=torch.bool)) for ids in self.tokens])

    @torch.no_grad()
    def outputs(self, tokens: torch.Tensor) -> Any:
        return self.plain(tokens.unsqueeze(0), output_hidden_states=True, use_cache=False)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Family:
    return Family(tmp_path_factory.mktemp(request.param), request.param)


def test_states_are_the_residual_streams_after_the_chosen_layers_and_the_normed_last_which_gives_the_logits(family):
    assert family.target.aux_layers == (2, LAYERS // 2, LAYERS - 3)
    for tokens, state in zip(family.tokens, family.target.states(family.batch()), strict=True):
        outputs = family.outputs(tokens)
        expected = torch.cat([outputs.hidden_states[layer][0] for layer in (2, 4, 5, -1)], -1)
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
        final = state[:, 3 * HIDDEN :]
        torch.testing.assert_close(family.target.logits(final), outputs.logits[0], rtol=1e-4, atol=1e-4)


def test_right_padding_changes_no_real_position(family):
    batch = family.batch()
    junk = batch.tokens.clone()
    for row, length in enumerate(LENGTHS):
        junk[row, length:] = 33
    plain = family.target.states(batch)
    padded = family.target.states(replace(batch, tokens=junk))
    for row, tokens in enumerate(family.tokens):
        alone = family.target.states(collate([(tokens, torch.ones(len(tokens), dtype=torch.bool))]))
        torch.testing.assert_close(plain[row], alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(padded[row], alone[0], rtol=1e-4, atol=1e-4)


def test_a_cpu_takes_conversations_one_at_a_time_where_they_would_be_padded(family):
    rows = [torch.arange(length) % 40 for length in (5, 90, 150)]
    calls = []
    with family.target.decoder.register_forward_pre_hook(
        lambda _module, _args, given: calls.append(given["input_ids"].shape), with_kwargs=True
    ):
        for some in (rows, [rows[0], rows[0][:3]]):
            states = family.target.states(collate([(row, row >= 0) for row in some]))
            alone = [family.target.states(collate([(row, row >= 0)]))[0] for row in some]
            torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)
    assert calls == [(1, 5), (1, 90), (1, 150)] * 2 + [(2, 5), (1, 5), (1, 3)]


def test_the_final_norm_is_what_the_draft_can_start_from(family):
    """A draft multiplies by its norm's weight; Gemma by 1 + weight."""
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))
    ours = torch.nn.functional.rms_norm(x, (HIDDEN,), family.target.norm, family.config.rms_norm_eps)
    torch.testing.assert_close(ours, family.target.decoder.norm(x))


def test_a_draft_trains_against_it(family):
    known = 24
    t2d = torch.arange(VOCAB) < known
    config = DraftConfig(**{**vars(family.config), "draft_vocab_size": known})
    draft = Eagle3Draft(config, t2d, torch.zeros(known, dtype=torch.int64))
    draft.initialise(0, family.target)
    objective = Objective(draft, family.target, 3, "sdpa", torch.float32, max(LENGTHS))
    batch = family.batch()
    losses = []
    for _ in range(6):
        loss, sums = objective(batch, family.target.states(batch))
        draft.zero_grad()
        (loss / sums.supervised.sum()).backward()
        with torch.no_grad():
            for weight in draft.parameters():
                weight -= 0.3 * weight.grad / weight.grad.norm()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not any(weight.requires_grad for weight in family.target.model.parameters())


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_target(folder, "llama")
    return folder


@pytest.mark.parametrize("layers", [(2, 4, LAYERS), (0, 2, 4), (2, 4, 99)])
def test_layers_that_the_target_has_not_are_refused(layers, llama):
    with pytest.raises(DraftModelError, match=f"8 layers, allowed: 1 to {LAYERS - 1}"):
        load_target(llama, layers, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("broken", ["absent", "no config", "torn weights"])
def test_a_folder_that_cannot_be_loaded_is_a_users_mistake(broken, tmp_path):
    folder = tmp_path / "model"
    if broken != "absent":
        save_target(folder, "llama")
    if broken == "no config":
        (folder / "config.json").unlink()
    if broken == "torn weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(DraftModelError, match="cannot be loaded"):
        load_target(folder, (2, 4, 5), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("GraniteConfig", {"logits_scaling": 5.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
        ("CohereConfig", {"logit_scale": 0.25}),
        ("Gemma2Config", {"head_dim": 16, "final_logit_softcapping": 0.5}),
    ],
)
def test_logits_that_are_scaled_or_capped(name, settings, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**SHAPE, **settings))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(tmp_path)
    target = load_target(tmp_path, (2, 4, 5), torch.float32, torch.device("cpu"))
    tokens = torch.arange(3, 20)
    (state,) = target.states(collate([(tokens, tokens > 0)]))
    with torch.no_grad():
        expected = model.eval()(tokens.unsqueeze(0)).logits[0]
    torch.testing.assert_close(target.logits(state[:, 3 * HIDDEN :]), expected, rtol=1e-4, atol=1e-5)
    plain = torch.nn.functional.linear(state[:, 3 * HIDDEN :], target.head)
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-3)
