from .component import train_draft_model

__all__ = ["train_draft_model"]
