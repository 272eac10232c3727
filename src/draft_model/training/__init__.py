"""The training job: what every process of it runs, on one machine or on many."""

from draft_model.training.config import TrainConfig, TrainResult

__all__ = ["TrainConfig", "TrainResult"]
