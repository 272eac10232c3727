from .component import evaluate_draft_model

__all__ = ["evaluate_draft_model"]
