"""The evaluation stage: how many tokens the draft saves, and that it changes none."""

from draft_model.evaluation.stage import EvaluateConfig, EvaluateResult, run

__all__ = ["EvaluateConfig", "EvaluateResult", "run"]
