"""The dataset stage: conversations in JSONL become tokens, loss masks and the draft vocabulary.

`run` builds the folder, `run_part` a part of it for `run` to find; `Split` and `load_vocabulary` are how the later
stages read it.
"""

from draft_model.dataset.build import DatasetConfig, DatasetResult, place, run, run_part
from draft_model.dataset.inputs import data_files, data_version
from draft_model.dataset.merge import REPORT_PAGE
from draft_model.dataset.tally import SplitSummary
from draft_model.dataset.tokens import Conversation, Split
from draft_model.dataset.vocabulary import load_vocabulary

__all__ = [
    "Conversation",
    "DatasetConfig",
    "DatasetResult",
    "Split",
    "SplitSummary",
    "REPORT_PAGE",
    "data_files",
    "data_version",
    "load_vocabulary",
    "place",
    "run",
    "run_part",
]
