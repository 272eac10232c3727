"""The component `resolve_compute`."""

from .component import resolve_compute

__all__ = ["resolve_compute"]
