"""Builds the data set: `run` encodes what is not encoded yet, piece by piece, and makes the folder whole.

Nothing is dropped in silence (rows in = kept + rejected, and cut ones are counted), memory does not grow with the
input, and the same inputs give the same bytes on any number of processes and pods. The fingerprint in the manifest
covers all that shapes the result: where it matches, there is nothing to do.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.dataset import part
from draft_model.dataset.encode import Encoder, EncoderSettings
from draft_model.dataset.inputs import Inputs, read_inputs, shaping
from draft_model.dataset.merge import merge
from draft_model.dataset.pieces import share
from draft_model.dataset.render import check_fit
from draft_model.dataset.tally import SplitSummary
from draft_model.parameters import Parameters
from draft_model.tracking import tracked

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetConfig:
    """What the stage works on.

    Attributes:
        model: URI of the imported model's folder; its tokenizer and config.json are read, not its weights.
        output: URI of the folder to write.
        parameters: the run's.
        work: local scratch folder, for downloads and for the data set before it is published.
    """

    model: str
    output: str
    parameters: Parameters
    work: Path


@dataclass(frozen=True)
class DatasetResult:
    """What the stage leaves; the manifest's properties hold the same.

    Attributes:
        uri: the data set's folder.
        reused: whether it was there already, whole and of the same inputs.
        fingerprint: sha256 of all that shapes the data set.
        vocab_size: V, the target's vocabulary.
        draft_vocab_size: D, the draft's.
        train: counts of the training split.
        validation: counts of the validation split; None without one.
    """

    uri: str
    reused: bool
    fingerprint: str
    vocab_size: int
    draft_vocab_size: int
    train: SplitSummary
    validation: SplitSummary | None

    def metrics(self) -> dict[str, float]:
        """What the KFP UI shows and compares between runs."""
        metrics: dict[str, float] = {"draft_vocab_size": self.draft_vocab_size}
        for split, counts in (("train", self.train), ("validation", self.validation)):
            if counts is not None:
                metrics |= {f"{split}_{name}": value for name, value in asdict(counts).items()}
        return metrics


@tracked("dataset", "dataset")
def run(config: DatasetConfig) -> DatasetResult:
    """Builds and publishes the data set, or finds it built; pieces that are whole already are used.

    Args:
        config: inputs and output.

    Returns:
        The folder's URI and what was counted.

    Raises:
        DraftModelError: an input is missing, unreadable, empty or too faulty, or the inputs do not fit each
            other; with the problems of both splits.
    """
    inputs = read_inputs(config.parameters, config.model, config.work)
    if properties := _built_before(config.output, inputs.fingerprint):
        log.info("%s is already built from the same inputs; nothing to do", config.output)
        return _result(config.output, properties, reused=True)
    encoder = _encode(config, inputs, 0, 1)
    properties = merge(config.parameters, inputs, encoder, config.output, config.work)
    result = _result(config.output, properties, reused=False)
    _log_counts(result)
    return result


def run_part(config: DatasetConfig, number: int, parts: int) -> list[tuple[str, str]]:
    """Builds one of several parts of the data set; `run` makes it whole when all are there.

    Args:
        config: inputs and output, the same for all parts.
        number: which part, from 0.
        parts: how many parts there are.

    Returns:
        The part's files, and which pieces of each.

    Raises:
        DraftModelError: an input is missing or unreadable, or the inputs do not fit each other.
    """
    inputs = read_inputs(config.parameters, config.model, config.work)
    if _built_before(config.output, inputs.fingerprint):
        log.info("%s is already built from the same inputs; nothing to do", config.output)
    else:
        _encode(config, inputs, number, parts)
    return [
        (source.file.uri, f"{units.start + 1} to {units.stop} of {source.count()}" if units else "all")
        for source, units in share(inputs.sources, number, parts)
    ]


def place(parameters: Parameters, model: str, data_version: str, storage_uri: str) -> str:
    """Where the pods of a pipeline build one data set together.

    Args:
        parameters: the run's.
        model: URI of the imported model's folder.
        data_version: changes with the content of the data files.
        storage_uri: folder of the run; where there is none, it is beside the model, by what shapes the data set.
    """
    if storage_uri:
        return storage.join(storage_uri, "dataset")
    shaped_by = [data_version, shaping(parameters)]
    key = hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()
    return f"{model.rstrip('/')}-datasets/{key[:16]}"


def _built_before(output: str, fingerprint: str) -> Mapping[str, Any] | None:
    if not storage.exists(output):
        return None
    properties: Mapping[str, Any] = storage.read_manifest(output, stage="dataset").properties
    return properties if properties.get("fingerprint") == fingerprint else None


def _encode(config: DatasetConfig, inputs: Inputs, number: int, parts: int) -> Encoder:
    given = config.parameters
    encoder = Encoder(
        EncoderSettings(inputs.model.folder, given.chat_template, given.max_length, inputs.model.vocab_size)
    )
    check_fit(encoder.tokenizer, encoder.template)
    folder = config.work / f"dataset.building-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    part.encode(encoder, inputs, config.output, folder, given.build_dataset_num_proc, number, parts)
    shutil.rmtree(folder)
    return encoder


def _result(uri: str, properties: Mapping[str, Any], *, reused: bool) -> DatasetResult:
    splits = {split: SplitSummary(**counts) for split, counts in properties["splits"].items()}
    return DatasetResult(
        uri,
        reused,
        properties["fingerprint"],
        properties["vocab_size"],
        properties["draft_vocab_size"],
        splits["train"],
        splits.get("validation"),
    )


def _log_counts(result: DatasetResult) -> None:
    for split, counts in (("train", result.train), ("validation", result.validation)):
        if counts:
            log.info(
                "%s: %d rows in, %d kept, %d rejected, %d truncated; %d tokens, %d supervised, "
                "%.2f %% of them in the draft vocabulary of %d",
                split, counts.rows_in, counts.rows_kept, counts.rows_rejected, counts.rows_truncated,
                counts.tokens, counts.supervised_tokens, 100 * counts.coverage, result.draft_vocab_size,
            )  # fmt: skip
