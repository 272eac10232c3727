"""Builds the data set: pieces of the input become shards on several processes, and the manifest makes them whole.

A piece is about 16 MB of whole lines after decompression, so where it begins and ends depends on the file alone. Its
shard is uploaded as soon as it is encoded, then a small file with its counts: what has both is not encoded again after
a kill. Both are named after the content of the file and all settings, so the same inputs give the same bytes, on any
number of processes, and two runs at once write the same files.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from draft_model import storage
from draft_model.dataset import vocabulary
from draft_model.dataset.encode import Encoder, EncoderSettings
from draft_model.dataset.files import File, find, read_errors
from draft_model.dataset.render import check_fit
from draft_model.dataset.report import write_report
from draft_model.dataset.tally import SplitSummary, Tally
from draft_model.dataset.templates import TEMPLATES
from draft_model.dataset.tokens import INDEX, Shard, write_index
from draft_model.dataset.workers import Workers
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters
from draft_model.tracking import tracked

log = logging.getLogger(__name__)

FORMAT = 4
"""Raised whenever this package would make something else of the same inputs."""
PIECE_BYTES = 16 << 20
REPORT = "report.json"
REPORT_PAGE = "report.html"
REJECTED = "rejected.jsonl"

_PIECES = "pieces"
_SPLITS = ("train", "validation")
_DEFAULT_DRAFT_VOCABULARY = 32_000
_MAKERS = ("pipeline-draft-model", "tokenizers", "transformers", "jinja2")
_MODEL_FILES = (
    "config.json", "tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template",
    "additional_chat_templates/",
)  # fmt: skip


@dataclass(frozen=True)
class DatasetConfig:
    """What the stage works on.

    Attributes:
        model: URI of the imported model's folder; its tokenizer and config.json are read, not its weights.
        output: URI of the folder to write; not used with `root`.
        parameters: the run's.
        work: local scratch folder, for downloads and for shards until they are uploaded.
        root: URI of the pipeline root or storage_uri: the data set goes to `<root>/datasets/<key>`, and one that is
            whole there is reused. The key is a hash of all that shapes it.
    """

    model: str
    output: str
    parameters: Parameters
    work: Path
    root: str = ""


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


@dataclass(frozen=True)
class _Source:
    """One file of a split.

    Attributes:
        split: `train` or `validation`.
        index: of the file in its split.
        file: the file.
        key: hash of the file's content and the settings.
    """

    split: str
    index: int
    file: File
    key: str

    def pieces(self) -> Iterator[tuple[str, int, bytes]]:
        """Yields the name of each piece, the lines before it, and its lines."""
        lines = number = 0
        with read_errors(self.file.uri, f"dataset_{self.split}_split"), self.file.open() as stream:
            while piece := stream.read(PIECE_BYTES):
                piece += stream.readline()
                yield f"part-{self.index:05d}-{number:05d}-{_hash(self.key, PIECE_BYTES, number)[:12]}", lines, piece
                lines += piece.count(b"\n")
                number += 1


@dataclass(frozen=True)
class _Inputs:
    """Checked inputs: the target's tokenizer folder and V, the files, D, and the hash of all of it."""

    tokenizer: Path
    vocab_size: int
    sources: list[_Source]
    draft_vocab_size: int
    fingerprint: str


@tracked("dataset", "dataset")
def run(config: DatasetConfig) -> DatasetResult:
    """Builds and publishes the data set, or finds it built; shards that are whole already are used.

    Args:
        config: inputs and output.

    Returns:
        The folder's URI and the counts.

    Raises:
        DraftModelError: an input is missing, unreadable, empty or too faulty, or the inputs do not fit each
            other; with the problems of both splits.
    """
    try:
        inputs = _read_inputs(config)
        output = storage.join(config.root, "datasets", inputs.fingerprint[:24]) if config.root else config.output
        if found := _find_built(output, inputs.fingerprint):
            log.info("%s is already built from the same inputs; nothing to do", output)
            return _result(output, found, reused=True)
        with TemporaryDirectory(dir=config.work, prefix="dataset-") as scratch:
            properties, reused = _build(config, inputs, output, Path(scratch))
    except OSError as error:
        raise DraftModelError(
            f"{error.filename or config.work}: {error.strerror or error}; give a scratch folder with free space"
        ) from error
    result = _result(output, properties, reused=reused)
    for split, counts in (("train", result.train), ("validation", result.validation)):
        if counts:
            log.info(
                "%s: %d rows in, %d kept, %d rejected, %d truncated; %d tokens, %d supervised, "
                "%.2f %% of them in the draft vocabulary of %d",
                split, counts.rows_in, counts.rows_kept, counts.rows_rejected, counts.rows_truncated,
                counts.tokens, counts.supervised_tokens, 100 * counts.coverage, result.draft_vocab_size,
            )  # fmt: skip
    return result


def _result(uri: str, properties: Mapping[str, Any], *, reused: bool) -> DatasetResult:
    splits = {split: SplitSummary(**counts) for split, counts in properties["splits"].items()}
    names = ("fingerprint", "vocab_size", "draft_vocab_size")
    return DatasetResult(uri, reused, *(properties[n] for n in names), splits["train"], splits.get("validation"))


def _find_built(output: str, fingerprint: str) -> Mapping[str, Any] | None:
    if storage.read_file(storage.join(output, storage.MANIFEST)) is None:
        return None
    manifest = storage.read_manifest(output, stage="dataset")
    same = manifest.properties.get("fingerprint") == fingerprint and storage.is_whole(output, manifest)
    return manifest.properties if same else None


def _read_inputs(config: DatasetConfig) -> _Inputs:
    """Fetches and checks all that the stage reads.

    Raises:
        DraftModelError: with all that is missing, unreadable or does not fit.
    """
    parameters = config.parameters
    problems: list[str] = []

    def attempt(step: Callable[..., Any], *given: Any, name: str = "") -> Any:
        try:
            return step(*given)
        except DraftModelError as error:
            problems.extend(f"{name}: {problem}" if name else problem for problem in error.problems)

    config.work.mkdir(parents=True, exist_ok=True)
    model = attempt(_fetch_model, config.model, config.work / "model")
    wanted = attempt(_draft_vocab_size, parameters.draft_model_config, config.work, name="draft_model_config")
    splits = {split: getattr(parameters, f"dataset_{split}_split") for split in _SPLITS}
    found = {split: attempt(_files, uri, name=f"dataset_{split}_split") or [] for split, uri in splits.items() if uri}
    if not splits["train"]:
        problems.append("dataset_train_split: not given; give the path or URI of a JSONL file of conversations")
    if model and wanted and wanted > model[1]:
        problems.append(
            f"draft_model_config: its draft_vocab_size is {wanted}; allowed: at most the target's vocabulary of "
            f"{model[1]}"
        )
    if problems:
        raise DraftModelError(problems)
    tokenizer, vocab_size, hashes = model
    settings = {
        "format": FORMAT,
        "versions": {name: version(name) for name in _MAKERS},
        "tokenizer": hashes,
        "vocab_size": vocab_size,
        "chat_template": asdict(TEMPLATES[parameters.chat_template]),
        "max_length": parameters.max_length,
    }
    sources = [
        _Source(split, index, file, _hash(settings, split, identity))
        for split, files in found.items()
        for index, (file, identity) in enumerate(files)
    ]
    size = wanted or min(_DEFAULT_DRAFT_VOCABULARY, vocab_size)
    named = [(source.split, source.file.name, source.key) for source in sources]
    return _Inputs(tokenizer, vocab_size, sources, size, _hash(named, size, parameters.max_rejected_fraction))


def _files(given: str) -> list[tuple[File, str]]:
    with read_errors(given):
        return [(file, file.identity()) for file in find(given)]


def _fetch_model(uri: str, into: Path) -> tuple[Path, int, dict[str, str]]:
    """Returns the folder with tokenizer and configuration, V, and the files' hashes."""
    manifest = storage.read_manifest(uri, stage="import")
    folder = storage.fetch(uri, into, only=lambda name: name.startswith(_MODEL_FILES))
    hashes = {file.path: file.sha256 for file in manifest.files if file.path.startswith(_MODEL_FILES)}
    config = _json(folder / "config.json", f"model: config.json of {uri}")
    text_config = config.get("text_config")
    vocab_size = config.get("vocab_size") or (text_config.get("vocab_size") if isinstance(text_config, dict) else None)
    if not isinstance(vocab_size, int):
        raise DraftModelError(f"model: config.json of {uri} has no vocab_size; import a text-generation model")
    return folder, vocab_size, hashes


def _draft_vocab_size(uri: str, work: Path) -> int | None:
    if not uri:
        return None
    size = _json(storage.fetch_file(uri, work / "draft_model_config"), uri).get("draft_vocab_size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise DraftModelError(f"{uri}: its draft_vocab_size is {size!r}; allowed: an integer >= 1")
    return size


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DraftModelError(f"{name}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DraftModelError(f"{name}: holds a JSON {type(content).__name__}; it must be an object")
    return content


def _build(config: DatasetConfig, inputs: _Inputs, output: str, folder: Path) -> tuple[Mapping[str, Any], bool]:
    """Encodes and publishes; returns the manifest's properties, and whether another run was faster."""
    given = config.parameters
    settings = EncoderSettings(inputs.tokenizer, given.chat_template, given.max_length, inputs.vocab_size)
    encoder = Encoder(settings)
    check_fit(encoder.tokenizer, encoder.template)
    splits = list(dict.fromkeys(source.split for source in inputs.sources))
    tallies = {split: Tally.empty(inputs.vocab_size, given.max_length) for split in splits}
    index: dict[str, list[Shard]] = {split: [] for split in splits}
    records: list[storage.FileRecord] = []
    size = sum(source.file.size for source in inputs.sources)
    with ExitStack() as stack:
        rejected = stack.enter_context((folder / REJECTED).open("w", encoding="utf-8"))
        workers = stack.enter_context(Workers(encoder, given.build_dataset_num_proc, size))
        for source, before, counts in _encode(inputs.sources, workers, output, folder):
            tally, name = tallies[source.split], source.file.name
            tally.add(counts)
            for number, reason, detail in counts["rejected"]:
                line = before + number
                several = sum(other.split == source.split for other in inputs.sources) > 1
                tally.reject(f"{name} line {line}" if several else f"line {line}", reason, detail)
                record = {"split": source.split, "file": name, "line": line, "reason": reason, "detail": detail}
                rejected.write(json.dumps(record) + "\n")
            if counts["shard"]:
                records.append(storage.FileRecord(**counts["shard"]))
                shard = records[-1].path.partition("/")[2]
                index[source.split].append(Shard(shard, int(sum(counts["lengths"][1])), name, before))
    _check_rejected(given, tallies)
    for split in splits:
        write_index(index[split], folder / split / INDEX)
    properties = _describe(given, encoder, inputs, tallies, folder)
    if found := _find_built(output, inputs.fingerprint):
        return found, True
    names = (REJECTED, REPORT, REPORT_PAGE, vocabulary.FILE, *(f"{split}/{INDEX}" for split in splits))
    records += [_put(folder / name, output, name) for name in names]
    storage.write_manifest(output, "dataset", records, properties)
    storage.remove(storage.join(output, _PIECES))
    return properties, False


def _encode(
    sources: list[_Source], workers: Workers, output: str, folder: Path
) -> Iterator[tuple[_Source, int, dict[str, Any]]]:
    """Yields the counts of all pieces in order, with the lines before them; uploads the shards that are new."""
    jobs = (
        ((source, name, before), None if found else (piece, folder / f"{name}.parquet"), found)
        for source in sources
        for name, before, piece in source.pieces()
        for found in [storage.read_file(storage.join(output, _PIECES, f"{name}.json"))]
    )
    for (source, name, before), counts in workers.map(jobs):
        if isinstance(counts, bytes):
            yield source, before, json.loads(counts)
            continue
        shard = folder / f"{name}.parquet"
        counts["shard"] = None
        if shard.exists():
            counts["shard"] = asdict(_put(shard, output, f"{source.split}/{name}.parquet"))
            shard.unlink()
        state = json.dumps(counts, sort_keys=True, separators=(",", ":")).encode()
        storage.write_bytes(storage.join(output, _PIECES, f"{name}.json"), state)
        yield source, before, counts


def _put(path: Path, output: str, name: str) -> storage.FileRecord:
    return replace(storage.put_file(path, storage.join(output, name)), path=name)


def _check_rejected(parameters: Parameters, tallies: Mapping[str, Tally]) -> None:
    """Refuses splits that are empty, or have too many unusable lines."""
    problems, allowed = [], parameters.max_rejected_fraction
    for split, tally in tallies.items():
        name = f"dataset_{split}_split: {getattr(parameters, f'dataset_{split}_split')}"
        rejected = tally.reasons.total()
        lines = tally.kept + rejected
        if not lines:
            problems.append(f"{name}: has no rows; give a JSONL file with a conversation in each line")
        elif not tally.kept or rejected > allowed * lines:
            problems.append(
                f"{name}: {rejected} of {lines} lines cannot be used ({rejected / lines:.1%}; max_rejected_fraction "
                f"allows {allowed:.1%}{'' if tally.kept else ', but one row must be left'}); correct them, or raise "
                f"max_rejected_fraction; the first are: {'; '.join(tally.first_rejected)}"
            )
    if problems:
        raise DraftModelError(problems)


def _describe(
    parameters: Parameters, encoder: Encoder, inputs: _Inputs, tallies: Mapping[str, Tally], folder: Path
) -> dict[str, Any]:
    """Writes vocabulary and report; returns the manifest's properties."""
    ids = vocabulary.choose(tallies["train"].supervised, inputs.draft_vocab_size)
    vocabulary.save_vocabulary(ids, inputs.vocab_size, folder / vocabulary.FILE)
    without = ("build_dataset_num_proc", "mlflow_tracking_uri")  # the same data has the same bytes
    properties = {
        "vocab_size": inputs.vocab_size,
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
    report = write_report(properties, sources, tallies, encoder.tokenizer, folder / REPORT_PAGE)
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    return properties


def _hash(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
