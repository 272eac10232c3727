"""Experiment tracking by MLflow, where MLFLOW_TRACKING_URI is set; it never stops or slows what it tracks."""

from draft_model.tracking.server import RUN, forwarded
from draft_model.tracking.tracker import Tracker, track, tracked

__all__ = ["RUN", "Tracker", "forwarded", "track", "tracked"]
