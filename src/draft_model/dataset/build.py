"""Builds the data set: pieces of the input become shards on several processes, and the manifest makes them whole.

A piece is about 8 MB of whole lines after decompression, so where it begins and ends depends on the file alone. Its
shard is uploaded as soon as it is encoded, then a small file with its counts: what has both is not encoded again after
a kill. Both are named after the content of the file and all settings, so the same inputs give the same bytes, on any
number of processes, and two runs at once write the same files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from draft_model import drafts, storage
from draft_model.dataset import report, vocabulary
from draft_model.dataset.encode import Encoder, EncoderSettings
from draft_model.dataset.files import File, identify, read_errors, read_line
from draft_model.dataset.render import check_fit
from draft_model.dataset.report import REJECTED, SplitSummary, Tally
from draft_model.dataset.templates import TEMPLATES
from draft_model.dataset.tokens import INDEX, Shard, write_index, write_shard
from draft_model.errors import DraftModelError, Problems
from draft_model.parameters import Parameters
from draft_model.tracking import tracked
from draft_model.workers import Workers

log = logging.getLogger(__name__)

FORMAT = 4  # raised whenever this package would make something else of the same inputs
PIECE_BYTES = BYTES_PER_PROCESS = 8 << 20
_PIECES = "pieces"
_SPLITS = ("train", "validation")
_MAKERS = ("pipeline-draft-model", "tokenizers", "transformers", "jinja2")
_MODEL_FILES = (
    "config.json", "tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template",
    "additional_chat_templates/",
)  # fmt: skip


@dataclass(frozen=True)
class DatasetConfig:
    """What the stage works on."""

    model: str  # URI of the imported model's folder; only its tokenizer and config.json are read
    output: str  # URI of the folder to write; not used with `root`
    parameters: Parameters
    work: Path  # local scratch folder, for downloads and for shards until they are uploaded
    root: str = ""  # URI below which it goes to `datasets/<key of all that shapes it>`, and is reused


@dataclass(frozen=True)
class DatasetResult:
    """What the stage leaves; the manifest's properties hold the same."""

    uri: str
    reused: bool  # it was there already, whole and of the same inputs
    fingerprint: str  # sha256 of all that shapes the data set
    vocab_size: int  # V, the target's
    draft_vocab_size: int  # D
    train: SplitSummary
    validation: SplitSummary | None

    def metrics(self) -> dict[str, float]:
        """Returns what the KFP UI shows and compares between runs."""
        splits = {"train": self.train, "validation": self.validation}
        counts = {f"{split}_{name}": value for split, of in splits.items() if of for name, value in asdict(of).items()}
        return {"draft_vocab_size": self.draft_vocab_size, **counts}


@dataclass(frozen=True)
class _Source:
    split: str  # `train` or `validation`
    index: int  # of the file in its split
    file: File
    key: str  # hash of the file's content and the settings

    def pieces(self) -> Iterator[tuple[str, int, bytes]]:
        """Yields the name of each piece, the number of lines before it, and its lines."""
        before = number = 0
        with read_errors(self.file.uri, f"dataset_{self.split}_split"), self.file.open() as stream:
            while piece := stream.read(PIECE_BYTES):
                piece += read_line(stream, self.file.uri)
                key = storage.content_key(self.key, PIECE_BYTES, number)[:12]
                yield f"part-{self.index:05d}-{number:05d}-{key}", before, piece
                before += piece.count(b"\n")
                number += 1


@dataclass(frozen=True)
class _Inputs:
    encoder: EncoderSettings
    sources: list[_Source]
    draft_vocab_size: int
    fingerprint: str


@tracked("dataset", "dataset")
def run(config: DatasetConfig) -> DatasetResult:
    """Builds and publishes the data set, or finds it built; shards that are whole already are used."""
    try:
        config.work.mkdir(parents=True, exist_ok=True)
        inputs = _read_inputs(config)
        output = storage.join(config.root, "datasets", inputs.fingerprint[:24]) if config.root else config.output
        if found := storage.find_whole(output, "dataset", fingerprint=inputs.fingerprint):
            log.info("%s is already built from the same inputs; nothing to do", output)
            return _result(output, found.properties, reused=True)
        with TemporaryDirectory(dir=config.work, prefix="dataset-") as scratch:
            properties, reused = _build(config, inputs, output, Path(scratch))
    except OSError as error:
        raise DraftModelError(
            f"{error.filename or config.work}: {error.strerror or error}; give a scratch folder with free space"
        ) from error
    log.info("%s: %s", output, json.dumps(properties["splits"]))
    return _result(output, properties, reused=reused)


def _result(uri: str, properties: Mapping[str, Any], *, reused: bool) -> DatasetResult:
    splits = {split: SplitSummary(**counts) for split, counts in properties["splits"].items()}
    sizes = {name: properties[name] for name in ("fingerprint", "vocab_size", "draft_vocab_size")}
    return DatasetResult(uri, reused, **sizes, train=splits["train"], validation=splits.get("validation"))


def _read_inputs(config: DatasetConfig) -> _Inputs:
    """Fetches and checks all that the stage reads; raises with all that is missing, unreadable or does not fit."""
    parameters, problems = config.parameters, Problems()
    found: dict[str, list[tuple[File, str]]] = {}
    with problems.collect("model"):
        tokenizer, vocab_size, hashes, target = _fetch_model(config.model, config.work / "model")
        with problems.collect("draft_model_config"):
            family = drafts.family(parameters.draft_architecture)
            shape = family.default_shape(target)
            if uri := parameters.draft_model_config:
                given = _json(storage.fetch_file(uri, config.work / "draft_model_config"), uri)
                shape = family.adapt(shape, given)
            size = int(shape.draft_vocab_size)
    for split in _SPLITS:
        if uri := getattr(parameters, f"dataset_{split}_split"):
            with problems.collect(f"dataset_{split}_split"):
                found[split] = identify(uri)
    if not parameters.dataset_train_split:
        problems.append("dataset_train_split: not given; give the path or URI of a JSONL file of conversations")
    problems.raise_all()
    settings = {
        "format": FORMAT,
        "versions": {name: version(name) for name in _MAKERS},
        "tokenizer": hashes,
        "vocab_size": vocab_size,
        "chat_template": asdict(TEMPLATES[parameters.chat_template]),
        "max_length": parameters.max_length,
    }
    sources = [
        _Source(split, index, file, storage.content_key(settings, split, identity))
        for split, files in found.items()
        for index, (file, identity) in enumerate(files)
    ]
    fingerprint = storage.content_key([(s.file.name, s.key) for s in sources], size, parameters.max_rejected_fraction)
    encoder = EncoderSettings(tokenizer, parameters.chat_template, parameters.max_length, vocab_size)
    return _Inputs(encoder, sources, size, fingerprint)


def _fetch_model(uri: str, into: Path) -> tuple[Path, int, dict[str, str], dict[str, Any]]:
    """Returns the folder with tokenizer and configuration, V, the files' hashes, and config.json."""
    manifest = storage.read_manifest(uri, stage="import")
    folder = storage.fetch(uri, into, only=lambda name: name.startswith(_MODEL_FILES))
    config = _json(folder / "config.json", f"config.json of {uri}")
    text_config = config.get("text_config")
    vocab_size = config.get("vocab_size") or (text_config.get("vocab_size") if isinstance(text_config, dict) else None)
    if not isinstance(vocab_size, int):
        raise DraftModelError(f"config.json of {uri} has no vocab_size; import a text-generation model")
    hashes = {file.path: file.sha256 for file in manifest.files if file.path.startswith(_MODEL_FILES)}
    return folder, vocab_size, hashes, config


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DraftModelError(f"{name}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DraftModelError(f"{name}: holds a JSON {type(content).__name__}; it must be an object")
    return content


def _build(config: DatasetConfig, inputs: _Inputs, output: str, folder: Path) -> tuple[Mapping[str, Any], bool]:
    """Encodes and publishes; returns the manifest's properties, and whether another run was faster."""
    given, settings = config.parameters, inputs.encoder
    files = Counter(source.split for source in inputs.sources)
    tallies = {split: Tally.empty(settings.vocab_size, given.max_length) for split in files}
    index: dict[str, list[Shard]] = {split: [] for split in files}
    records: list[storage.FileRecord] = []
    processes = usable_processes(given.build_dataset_num_proc, sum(source.file.size for source in inputs.sources))
    with Workers(processes) as workers, (folder / REJECTED).open("w", encoding="utf-8") as rejected:
        workers.call(_check_fit, settings)
        for source, before, counts in _encode(inputs, workers, output, folder):
            split, name = source.split, source.file.name
            tallies[split].add(counts)
            for number, reason, detail in counts["rejected"]:
                record = {"split": split, "file": name, "line": before + number, "reason": reason, "detail": detail}
                rejected.write(json.dumps(record) + "\n")
                where = f"{name} " if files[split] > 1 else ""
                tallies[split].reject(f"{where}line {before + number}", reason, detail)
            if counts["shard"]:
                records.append(storage.FileRecord(**counts["shard"]))
                shard = records[-1].path.partition("/")[2]
                index[split].append(Shard(shard, sum(counts["lengths"][1]), name, before))
        _check_rejected(given, tallies)
        samples = workers.call(_colour, settings, tallies["train"].samples)
    for split in files:
        write_index(index[split], folder / split / INDEX)
    properties = _describe(given, inputs, tallies, samples, folder)
    names = (REJECTED, report.REPORT, report.REPORT_PAGE, vocabulary.FILE, *(f"{split}/{INDEX}" for split in files))
    records += [storage.put_file(folder / name, output, name) for name in names]
    if found := storage.find_whole(output, "dataset", fingerprint=inputs.fingerprint):
        return found.properties, True  # its manifest would be gone for a moment
    manifest = storage.write_manifest(output, "dataset", records, properties)
    storage.remove(storage.join(output, _PIECES))
    if not storage.is_whole(output, manifest):
        storage.remove_manifest(output)
        raise DraftModelError(f"{output}: shards of an earlier attempt are missing; run the dataset stage again")
    return properties, False


def usable_processes(wanted: int, size: int) -> int:
    """Lowers build_dataset_num_proc to the cores and the bytes of all input: a process loads the tokenizer first."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # a pod's CPU limit is not in its affinity
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) // int(period))
    processes = max(1, min(wanted, cores, size // BYTES_PER_PROCESS))
    if processes < wanted:
        text = "build_dataset_num_proc: %d lowered to %d (%d cores, %.1f MB of input)"
        log.info(text, wanted, processes, cores, size / 1e6)
    return processes


def _encode(
    inputs: _Inputs, workers: Workers, output: str, folder: Path
) -> Iterator[tuple[_Source, int, dict[str, Any]]]:
    """Yields the counts of all pieces in order, with the lines before them; uploads the shards that are new."""
    from tqdm import tqdm

    def calls() -> Iterator[tuple[tuple[_Source, str, int, str, bytes | None], tuple[EncoderSettings, Path] | None]]:
        for source in inputs.sources:
            for name, before, piece in source.pieces():
                state = storage.join(output, _PIECES, f"{name}.json")
                found, path = storage.read_file(state), folder / f"{name}.jsonl"
                if found is None:
                    path.write_bytes(piece)
                yield (source, name, before, state, found), (inputs.encoder, path) if found is None else None

    with tqdm(desc="dataset", unit=" rows", unit_scale=True, mininterval=0.1 if os.isatty(2) else 10) as bar:
        for (source, name, before, state, found), counts in workers.map(_encode_piece, calls()):
            if counts is None:
                yield source, before, json.loads(found or b"")
                continue
            shard = folder / f"{name}.parquet"
            counts["shard"] = None
            if shard.exists():  # there is none where all lines are rejected
                counts["shard"] = asdict(storage.put_file(shard, output, f"{source.split}/{shard.name}"))
                shard.unlink()
            storage.write_bytes(state, json.dumps(counts, sort_keys=True, separators=(",", ":")).encode())
            bar.update(sum(counts["lengths"][1]) + len(counts["rejected"]))
            yield source, before, counts


_encoder = functools.lru_cache(maxsize=1)(Encoder)  # one a process


def _check_fit(settings: EncoderSettings) -> None:
    check_fit(_encoder(settings).tokenizer, TEMPLATES[settings.chat_template])


def _encode_piece(settings: EncoderSettings, path: Path) -> dict[str, Any]:
    """Encodes the lines of a file to a shard beside it, and removes it; without rows there is no shard."""
    lines = path.read_bytes().split(b"\n")
    path.unlink()
    rows = _encoder(settings).encode([(number, line) for number, line in enumerate(lines, start=1) if line.strip()])
    if len(rows.lengths):
        write_shard(rows, path.with_suffix(".parquet"))
    return report.count(rows)


def _colour(settings: EncoderSettings, samples: list[Any]) -> list[list[tuple[str, bool]]]:
    return [report.colour(_encoder(settings).tokenizer, ids, mask) for ids, mask in samples]


def _check_rejected(parameters: Parameters, tallies: Mapping[str, Tally]) -> None:
    """Refuses splits that are empty, or have too many unusable lines."""
    problems, allowed = Problems(), parameters.max_rejected_fraction
    for split, tally in tallies.items():
        name = f"dataset_{split}_split: {getattr(parameters, f'dataset_{split}_split')}"
        kept, rejected = int(tally.lengths.sum()), tally.reasons.total()
        if not (lines := kept + rejected):
            problems.append(f"{name}: has no rows; give a JSONL file with a conversation in each line")
        elif not kept or rejected > allowed * lines:
            problems.append(
                f"{name}: {rejected} of {lines} lines cannot be used ({rejected / lines:.1%}; max_rejected_fraction "
                f"allows {allowed:.1%}{'' if kept else ', but one row must be left'}); correct them, or raise "
                f"max_rejected_fraction; the first are: {'; '.join(tally.first_rejected)}"
            )
    problems.raise_all()


def _describe(
    parameters: Parameters, inputs: _Inputs, tallies: Mapping[str, Tally], samples: list[Any], folder: Path
) -> dict[str, Any]:
    """Writes vocabulary and report; returns the manifest's properties."""
    ids = vocabulary.choose(tallies["train"].supervised, inputs.draft_vocab_size)
    vocabulary.save_vocabulary(ids, inputs.encoder.vocab_size, folder / vocabulary.FILE)
    without = ("build_dataset_num_proc", "mlflow_tracking_uri")  # the same data has the same bytes
    properties = {
        "vocab_size": inputs.encoder.vocab_size,
        "draft_vocab_size": len(ids),
        "chat_template": parameters.chat_template,
        "max_length": parameters.max_length,
        "splits": {
            split: asdict(tally.summary(vocabulary.coverage(tally.supervised, ids))) for split, tally in tallies.items()
        },
        "fingerprint": inputs.fingerprint,
        "parameters": {n: value for n, value in parameters.of_stage("dataset").items() if n not in without},
    }
    sources = {split: [s.file.name for s in inputs.sources if s.split == split] for split in tallies}
    report.write_report("dataset", report.make_report(properties, sources, tallies, samples), folder)
    return properties
