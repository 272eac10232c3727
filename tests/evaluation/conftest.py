"""A tiny target with a trained draft, made by the real stages; report and card of inputs to be looked at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from report_inputs import Json, make_dataset, make_evaluation, make_training
from training.case import Inputs, Trainer

from draft_model import evaluation
from draft_model.evaluation.card import write_card
from draft_model.evaluation.report import write_report
from draft_model.parameters import Parameters


@dataclass(frozen=True)
class Trained:
    """Inputs of an evaluation; each gets a copy of the trained draft."""

    inputs: Inputs
    final: Path

    def evaluate(self, folder: Path, **settings) -> tuple[evaluation.EvaluateResult, Path]:
        """The stage on a copy of the draft in a folder of its own; its result and that copy."""
        draft = folder / "final"
        shutil.copytree(self.final, draft)
        defaults = {"evaluation_conversations": 4, "evaluation_max_new_tokens": 12, "num_speculative_tokens": 2}
        parameters = Parameters(**{**defaults, **settings})
        config = evaluation.EvaluateConfig(
            self.inputs.model, self.inputs.dataset, str(draft), folder / "work", parameters
        )
        return evaluation.run(config), draft


@pytest.fixture(scope="session")
def trained(inputs, tmp_path_factory) -> Trained:
    """A draft trained for two epochs; nobody may change it."""
    return Trained(inputs, Path(Trainer(inputs, tmp_path_factory.mktemp("trained"))(num_epochs=2).result.final))


@pytest.fixture(name="training")
def _training() -> Json:
    return make_training()


@pytest.fixture(name="evaluation")
def _evaluation() -> Json:
    return make_evaluation()


@pytest.fixture(name="dataset")
def _dataset() -> Json:
    return make_dataset()


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., str]:
    """Writes a report and reads it."""

    def write(*inputs: Any) -> str:
        training, evaluation, dataset, *hashes = inputs
        content = {"training": training, "dataset": dataset, "evaluation": evaluation, "not_measured": "no prompts"}
        write_report(tmp_path / "report.html", {**content, "hashes": hashes[0] if hashes else []})
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


@pytest.fixture
def card(tmp_path: Path) -> Callable[..., str]:
    """Writes a card and reads it."""

    def write(*inputs: Any, name: str = "smollm2-eagle3") -> str:
        write_card(tmp_path / "README.md", *inputs, name=name)
        return (tmp_path / "README.md").read_text(encoding="utf-8")

    return write
