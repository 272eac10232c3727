"""Builds the data set: `run` reads each split once, in order, and publishes shards, vocabulary and report.

Nothing is dropped in silence (rows in = kept + rejected, and cut ones are counted), memory does not grow with
the input, and the same inputs give the same bytes on any number of processes. The fingerprint in the manifest
covers all that shapes the result: where it matches, there is nothing to do.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from draft_model import storage
from draft_model.dataset import vocabulary
from draft_model.dataset.encode import Encoded, Encoder, Encoders, EncoderSettings, usable_processes
from draft_model.dataset.inputs import Inputs, Source, SplitName, read_inputs
from draft_model.dataset.reader import chunks, numbered_lines
from draft_model.dataset.report import SplitSummary, Tally, sample
from draft_model.dataset.templates import check_fit
from draft_model.dataset.tokens import ShardWriter
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters

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


def run(config: DatasetConfig) -> DatasetResult:
    """Builds and publishes the data set, or finds it built.

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
    encoder = _encoder(config.parameters, inputs)
    folder = config.work / "dataset.building"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tallies = _encode_splits(config.parameters, encoder, inputs.sources, folder)
    properties = _describe(config.parameters, encoder, inputs, tallies, folder)
    storage.publish(folder, config.output, stage="dataset", properties=properties)
    shutil.rmtree(folder)
    result = _result(config.output, properties, reused=False)
    _log_counts(result)
    return result


def _built_before(output: str, fingerprint: str) -> Mapping[str, Any] | None:
    if not storage.exists(output):
        return None
    properties: Mapping[str, Any] = storage.read_manifest(output, stage="dataset").properties
    return properties if properties.get("fingerprint") == fingerprint else None


def _encoder(parameters: Parameters, inputs: Inputs) -> Encoder:
    encoder = Encoder(
        EncoderSettings(inputs.model.folder, parameters.chat_template, parameters.max_length, inputs.model.vocab_size)
    )
    check_fit(encoder.tokenizer, encoder.template)
    return encoder


def _encode_splits(
    parameters: Parameters, encoder: Encoder, sources: tuple[Source, ...], folder: Path
) -> dict[SplitName, Tally]:
    """Writes the shards of all splits and rejected.jsonl.

    Raises:
        DraftModelError: with what is wrong with either split.
    """
    processes = usable_processes(parameters.build_dataset_num_proc, sum(source.size for source in sources))
    tallies: dict[SplitName, Tally] = {}
    problems: list[str] = []
    with (
        Encoders(encoder, processes) as encoders,
        (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected,
    ):
        for source in sources:
            try:
                tally = _encode_split(encoders, source, folder / source.split, rejected)
                _judge(tally, source, parameters.max_rejected_fraction)
                tallies[source.split] = tally
            except DraftModelError as error:
                problems += error.problems
    if problems:
        raise DraftModelError(problems)
    return tallies


def _encode_split(encoders: Encoders, source: Source, folder: Path, rejected: TextIO) -> Tally:
    tally = Tally.empty(encoders.settings.vocab_size, encoders.settings.max_length)
    encoded = encoders.map(chunks(numbered_lines(source.path, source.name)))
    with ShardWriter(folder) as writer:
        for rows in _with_progress(encoded, source.split):
            tally.add(rows)
            writer.add(rows)
            for number, reason, detail in rows.rejected:
                record = {"split": source.split, "line": number, "reason": reason, "detail": detail}
                rejected.write(json.dumps(record) + "\n")
    return tally


def _with_progress(encoded: Iterator[Encoded], split: SplitName) -> Iterator[Encoded]:
    from tqdm import tqdm

    # In a log file every refresh is a line.
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(desc=f"dataset {split}", unit=" rows", unit_scale=True, mininterval=interval) as bar:
        for rows in encoded:
            yield rows
            bar.update(len(rows.lengths) + len(rows.rejected))


def _judge(tally: Tally, source: Source, allowed: float) -> None:
    """Refuses a split that is empty or has too many unusable lines."""
    lines = tally.kept + tally.rejected
    if not lines:
        raise DraftModelError(f"{source.name}: has no rows; give a JSONL file with a conversation in each line")
    if tally.kept and tally.rejected <= allowed * lines:
        return
    raise DraftModelError(
        f"{source.name}: {tally.rejected} of {lines} lines cannot be used ({tally.rejected / lines:.1%}; "
        f"max_rejected_fraction allows {allowed:.1%}{'' if tally.kept else ', but one row must be left'}); "
        f"correct them, or raise max_rejected_fraction; the first are: {'; '.join(tally.first_rejected)}"
    )


def _describe(
    parameters: Parameters, encoder: Encoder, inputs: Inputs, tallies: Mapping[SplitName, Tally], folder: Path
) -> dict[str, Any]:
    """Writes vocabulary and report.

    Returns:
        The manifest's properties.
    """
    train, validation = tallies["train"], tallies.get("validation")
    ids = vocabulary.choose(train.supervised, inputs.draft_vocab_size)
    vocabulary.save_vocabulary(ids, inputs.model.vocab_size, folder / vocabulary.FILE)
    splits = {
        split: asdict(tally.summary(vocabulary.coverage(tally.supervised, ids))) for split, tally in tallies.items()
    }
    properties = {
        "vocab_size": inputs.model.vocab_size,
        "draft_vocab_size": len(ids),
        "chat_template": parameters.chat_template,
        "max_length": parameters.max_length,
        "splits": splits,
        "fingerprint": inputs.fingerprint,
        # The number of processes shapes nothing, and the same data has the same bytes whatever it was.
        "parameters": {k: v for k, v in parameters.of_stage("dataset").items() if k != "build_dataset_num_proc"},
    }
    assert train.first_row is not None
    report = properties | {
        "sources": {source.split: source.sha256 for source in inputs.sources},
        "splits": {split: counts | tallies[split].details() for split, counts in splits.items()},
        "coverage_by_size": vocabulary.coverage_by_size(
            train.supervised, None if validation is None else validation.supervised
        ),
        "sample": sample(encoder.tokenizer, *train.first_row),
    }
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    return properties


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
