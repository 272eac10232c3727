"""The stage `regenerate`: the assistants' turns of conversations become the target's own answers."""

from draft_model.regenerate.stage import RegenerateConfig, RegenerateResult, run

__all__ = ["RegenerateConfig", "RegenerateResult", "run"]
