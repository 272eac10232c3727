"""The training step as a job: started, followed and ended from the coordinating process."""

from draft_model.jobs.local import run

__all__ = ["run"]
