"""From pieces to a data set: counts added up, the draft vocabulary chosen, the report written, the manifest last.

No token is read here. Shards stay where the pods that built them have put them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from draft_model.dataset import vocabulary
from draft_model.dataset.encode import Encoder
from draft_model.dataset.inputs import Inputs, shaping
from draft_model.dataset.part import counts_name, read_counts
from draft_model.dataset.pieces import Source
from draft_model.dataset.report import colour, write_report
from draft_model.dataset.tally import Tally
from draft_model.dataset.tokens import INDEX, Shard, write_index
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters
from draft_model.storage import growing
from draft_model.storage.manifest import FileRecord

REPORT = "report.json"
REPORT_PAGE = "report.html"
REJECTED = "rejected.jsonl"


def merge(parameters: Parameters, inputs: Inputs, encoder: Encoder, output: str, work: Path) -> dict[str, Any]:
    """Makes the output folder whole.

    Args:
        parameters: the run's.
        inputs: all that the stage reads; each of their pieces is whole.
        encoder: of the target's tokenizer.
        output: URI of the data set's folder.
        work: local scratch folder.

    Returns:
        The manifest's properties.

    Raises:
        DraftModelError: a split is empty or has too many unusable lines; with what is wrong with either split.
    """
    folder = work / "dataset.merging"
    folder.mkdir(parents=True, exist_ok=True)
    sums = _add_up(inputs, output, folder)
    problems = [
        problem
        for split, tally in sums.tallies.items()
        if (problem := _problem(tally, _given(parameters, split), parameters.max_rejected_fraction))
    ]
    if problems:
        raise DraftModelError(problems)
    properties = _describe(parameters, encoder, inputs, sums.tallies, folder)
    names = (REJECTED, REPORT, REPORT_PAGE, vocabulary.FILE, *(f"{split}/{INDEX}" for split in sums.tallies))
    growing.seal(output, sums.shards, {name: folder / name for name in names}, stage="dataset", properties=properties)
    growing.remove(output, sums.pieces)
    return properties


def _given(parameters: Parameters, split: str) -> str:
    parameter = f"dataset_{split}_split"
    return f"{parameter}: {getattr(parameters, parameter)}"


@dataclass
class _Sums:
    """All pieces together: counts by split, the records of the shards, the names of the pieces' own counts."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    shards: list[FileRecord] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)


def _pieces(source: Source, output: str) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    while True:
        counts = read_counts(output, source, number)
        if counts is None:
            raise DraftModelError(f"{source.name}: piece {number} is missing in {output}; run the dataset stage again")
        yield number, counts
        if counts["at_end"]:
            return
        number += 1


def _add_up(inputs: Inputs, output: str, folder: Path) -> _Sums:
    """Adds the pieces up, and writes rejected.jsonl and each split's index."""
    sums = _Sums()
    shards: dict[str, list[Shard]] = {}
    with (folder / REJECTED).open("w", encoding="utf-8") as rejected:
        for source in inputs.sources:
            tally = sums.tallies.setdefault(source.split, Tally.empty(inputs.model.vocab_size, inputs.max_length))
            index = shards.setdefault(source.split, [])
            several = sum(other.split == source.split for other in inputs.sources) > 1
            before = 0
            for number, counts in _pieces(source, output):
                sums.pieces.append(counts_name(source, number))
                tally.add_json(counts)
                _reject(counts, source, before, several, tally, rejected)
                if counts["shard"]:
                    sums.shards.append(FileRecord(**counts["shard"]))
                    name = sums.shards[-1].path.partition("/")[2]
                    index.append(Shard(name, counts["rows"], source.file.name, before))
                before += counts["lines"]
    for split, index in shards.items():
        write_index(index, folder / split / INDEX)
    return sums


def _reject(
    counts: Mapping[str, Any], source: Source, before: int, several: bool, tally: Tally, rejected: TextIO
) -> None:
    for number, reason, detail in counts["rejected"]:
        line = before + number
        tally.reject(f"{source.file.name} line {line}" if several else f"line {line}", reason, detail)
        record = {
            "split": source.split, "file": source.file.name, "line": line, "reason": reason, "detail": detail
        }  # fmt: skip
        rejected.write(json.dumps(record) + "\n")


def _problem(tally: Tally, name: str, allowed: float) -> str | None:
    """Why a split cannot be used: it is empty, or has too many unusable lines."""
    lines = tally.kept + tally.rejected
    if not lines:
        return f"{name}: has no rows; give a JSONL file with a conversation in each line"
    if tally.kept and tally.rejected <= allowed * lines:
        return None
    return (
        f"{name}: {tally.rejected} of {lines} lines cannot be used ({tally.rejected / lines:.1%}; "
        f"max_rejected_fraction allows {allowed:.1%}{'' if tally.kept else ', but one row must be left'}); "
        f"correct them, or raise max_rejected_fraction; the first are: {'; '.join(tally.first_rejected)}"
    )


def _describe(
    parameters: Parameters, encoder: Encoder, inputs: Inputs, tallies: Mapping[str, Tally], folder: Path
) -> dict[str, Any]:
    """Writes vocabulary and report; gives the manifest's properties."""
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
        "parameters": shaping(parameters),
    }
    report = properties | {
        "sources": {
            split: [source.file.name for source in inputs.sources if source.split == split] for split in tallies
        },
        "splits": {split: counts | tallies[split].details() for split, counts in splits.items()},
        "coverage_by_size": vocabulary.coverage_by_size(
            train.supervised, None if validation is None else validation.supervised
        ),
        "samples": [colour(encoder.tokenizer, ids, mask) for ids, mask in train.samples],
    }
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    write_report(report, folder / REPORT_PAGE)
    return properties
