"""The evaluation stage: how many tokens the draft saves, and that it changes none."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from draft_model.parameters import Parameters


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation."""

    model: str  # URI of the imported target
    dataset: str  # URI of the data set
    final: str  # URI of the trained draft; the report, its data and the model card are added to it
    work: Path  # scratch folder on this machine
    parameters: Parameters


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation leaves."""

    final: str  # URI of the draft, with report.html, evaluation.json and README.md beside it
    measured: bool = False  # whether there were prompts to measure on
    acceptance_length: float = 0.0  # tokens per forward pass of the target, with the trained draft
    untrained_acceptance_length: float = 0.0  # with the same draft before training
    acceptance_by_position: Sequence[float] = ()  # share of rounds that kept the k-th proposal, [K]
    compared_tokens: int = 0  # tokens that were found equal to the target's own


def run(config: EvaluateConfig) -> EvaluateResult:
    """Evaluates a trained draft; see `stage`, which needs torch."""
    from draft_model.evaluation import stage

    return stage.run(config)
