"""The dataset stage: conversations in JSONL become tokens, loss masks and the draft vocabulary.

`run` builds the folder; `Split` and `load_vocabulary` are how the later stages read it.
"""

from draft_model.dataset.build import DatasetConfig, DatasetResult, run
from draft_model.dataset.report import SplitSummary
from draft_model.dataset.tokens import Conversation, Split
from draft_model.dataset.vocabulary import load_vocabulary

__all__ = [
    "Conversation",
    "DatasetConfig",
    "DatasetResult",
    "Split",
    "SplitSummary",
    "load_vocabulary",
    "run",
]
