from .component import evaluate_draft_model as evaluate_draft_model
