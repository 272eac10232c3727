"""The component `plan_dataset`."""

from .component import plan_dataset

__all__ = ["plan_dataset"]
