"""The component `import_tokenizer`."""

from .component import import_tokenizer

__all__ = ["import_tokenizer"]
