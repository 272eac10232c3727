"""The dataset stage: conversations in JSONL become tokens, loss masks and the draft vocabulary.

`run` builds the folder; `Split` and `load_vocabulary` are how the later stages read it. `read_conversations` reads the
same files for prompts.
"""

from draft_model.dataset.build import DatasetConfig, DatasetResult, run
from draft_model.dataset.reader import Rejected, Row, read_conversations
from draft_model.dataset.report import REPORT_PAGE
from draft_model.dataset.tokens import Split
from draft_model.dataset.vocabulary import load_vocabulary

__all__ = [
    "REPORT_PAGE", "DatasetConfig", "DatasetResult", "Rejected", "Row", "Split", "load_vocabulary",
    "read_conversations", "run",
]  # fmt: skip
