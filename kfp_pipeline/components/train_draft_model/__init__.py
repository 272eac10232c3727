from .component import train_draft_model as train_draft_model
