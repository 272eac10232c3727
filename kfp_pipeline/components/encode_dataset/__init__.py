"""The component `encode_dataset`."""

from .component import encode_dataset

__all__ = ["encode_dataset"]
