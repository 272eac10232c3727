"""The component `build_dataset`."""

from .component import build_dataset

__all__ = ["build_dataset"]
