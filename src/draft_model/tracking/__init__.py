"""Experiment tracking by MLflow, where a server is named; it never stops or slows what it tracks."""

from draft_model.tracking.server import LOGIN, RUN, forwarded
from draft_model.tracking.tracker import Tracker, send_log, track, tracked

__all__ = ["LOGIN", "RUN", "Tracker", "forwarded", "send_log", "track", "tracked"]
