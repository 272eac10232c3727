"""The import stage: a target model from one of three kinds of sources becomes one canonical folder at a URI."""

from draft_model.model_import.stage import ImportConfig, ImportResult, is_weight, run

__all__ = ["ImportConfig", "ImportResult", "is_weight", "run"]
