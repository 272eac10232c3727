from .component import preflight

__all__ = ["preflight"]
