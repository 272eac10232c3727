"""The import stage: one of three sources of a target model becomes one canonical folder at a URI."""

from draft_model.model_import.description import Description, DescriptionConfig, describe
from draft_model.model_import.stage import ImportConfig, ImportResult, is_weight, run

__all__ = ["Description", "DescriptionConfig", "ImportConfig", "ImportResult", "describe", "is_weight", "run"]
