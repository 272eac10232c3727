from .component import clean_up

__all__ = ["clean_up"]
