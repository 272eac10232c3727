"""The evaluation stage: how many tokens the draft saves, and that it changes none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    metrics: Mapping[str, float] = field(default_factory=dict)  # as the step shows them; none without a prompt


def run(config: EvaluateConfig) -> EvaluateResult:
    """Evaluates a trained draft; see `stage`, which needs torch."""
    from draft_model.evaluation import stage

    return stage.run(config)
