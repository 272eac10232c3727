"""`run`: find the source, check that the model can be used, publish what later stages need of it.

The canonical folder holds config.json, generation_config.json, safetensors (with their index where there are several),
the tokenizer's files with all chat templates, and a manifest that names source, revision, licence, architecture and
parameter count. Weights are downloaded to the scratch folder once the model is known to be usable; from an object store
to the same one they are copied there.
"""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.markdown import table
from draft_model.model_import import sources
from draft_model.model_import.sources import CARD, INDEX, Source, Weights
from draft_model.parameters import Parameters
from draft_model.storage.transfer import check_free_disk
from draft_model.tracking import tracked
from draft_model.workers import Limits, Workers

logger = logging.getLogger(__name__)

STAGE = "import"
_FORMAT = 2  # of the canonical folder; part of the content key, so that a change of it imports anew
_CONVERTED_PER_SECOND = 10**7  # bytes of a pickle in a second of CPU time, at the least
LIMITS = Limits(memory=6 << 30, cpu=300, wall=1200)
"""Tokenizers of 260,000 tokens and 100 layers of 256 experts need a tenth of them."""
_STOPPED = (
    "reading its files took more than {cpu} s of CPU time, {wall} s in all or {memory} GiB of memory and was stopped: "
    "a file of it is damaged or made to do harm, or the machine is too small; check where the model comes from, or "
    "save it again with save_pretrained"
)


@dataclass(frozen=True)
class ImportConfig:
    """One import."""

    output: str  # URI of the folder to write; not used with `root`
    work: Path  # scratch folder on this machine
    parameters: Parameters  # of the run; exactly one model source is given
    root: str = ""  # URI below which it goes to `models/<key of its content>`, and is reused


@dataclass(frozen=True)
class ImportResult:
    """What an import leaves; words are empty where there is nothing to say."""

    uri: str  # of the canonical folder
    source: str  # what was imported, as the user gave it
    revision: str  # commit of a Hub repository
    licence: str  # as the source names it
    architecture: str  # transformers' class
    parameter_count: int  # number of weights; those that are used twice count once
    conversion: str  # what was done to weights that were no safetensors
    size: int  # bytes of all files
    quantization: str = ""  # of the weights, such as `fp8`
    max_positions: int = 0  # longest sequence that the target was made for, in tokens; 0 where it does not say
    reused: bool = False  # whether it was there already, whole and of the same content

    def markdown(self) -> str:
        """What the KFP UI shows."""
        return table({
            "model": self.source, "revision": self.revision or "none: no repository of the Hub",
            "architecture": self.architecture, "parameters": f"{self.parameter_count:,}",
            "size": f"{self.size / 1e9:,.2f} GB", "conversion": self.conversion or "none: the weights were safetensors",
            "quantization": self.quantization or "none", "licence": self.licence or "none named", "folder": self.uri,
            "imported": "before, and used again" if self.reused else "by this run",
        })  # fmt: skip


def is_weight(name: str) -> bool:
    """Whether a file of the canonical folder holds weights or tells where they are."""
    return name.endswith((".safetensors", ".safetensors.index.json"))


@tracked("import", "model")
def run(config: ImportConfig) -> ImportResult:
    """Imports the target model; where the same content is there already, whole, copies nothing."""
    config.work.mkdir(parents=True, exist_ok=True)
    source = sources.resolve(config.parameters, config.work)
    files = sorted((name, file.size, file.stamp) for name, file in source.files.items())
    key = storage.content_key(_FORMAT, source.parameter, source.name, source.listing.revision, files)[:32]
    uri = storage.join(config.root, "models", key) if config.root else config.output
    if (before := _imported_before(uri, key)) is not None:
        logger.info("%s is at %s already, whole: nothing is copied", source.name, uri)
        return before
    try:
        folder, remote, facts = prepare(source, config.work, uri)
    except DraftModelError as error:
        start = f"target model {source.name}: "
        raise DraftModelError([p if p.startswith(source.parameter) else start + p for p in error.problems]) from error
    if not config.root:
        storage.remove_manifest(uri)
    elif (before := _imported_before(uri, key)) is not None:  # by a run beside this one, and may be read already
        return before
    properties = {
        **facts, "source": source.name, "revision": source.listing.revision, "digest": key,
        "licence": _licence(source), "parameters": config.parameters.of_stage("import"),
    }  # fmt: skip
    manifest = storage.write_manifest(uri, STAGE, _upload(source, folder, uri, remote), properties)
    result = _result(uri, manifest, reused=False)
    said = f"{result.architecture}, {result.parameter_count / 1e6:.1f} M parameters, {result.size / 1e6:.0f} MB"
    logger.info("imported %s: %s, to %s", source.name, said, uri)
    return result


def _imported_before(uri: str, key: str) -> ImportResult | None:
    try:
        manifest = storage.find_whole(uri, STAGE, digest=key)
        return _result(uri, manifest, reused=True) if manifest else None
    except (DraftModelError, TypeError):  # a damaged one, or an older version's, is replaced
        return None


def _result(uri: str, manifest: storage.Manifest, *, reused: bool) -> ImportResult:
    known = {field.name for field in fields(ImportResult)} & manifest.properties.keys()
    return ImportResult(**{n: manifest.properties[n] for n in known}, uri=uri, size=manifest.size, reused=reused)


def prepare(source: Source, work: Path, uri: str) -> tuple[Path, list[str], dict[str, Any]]:
    """Checks the model and makes its canonical folder in the scratch folder, where weights are links.

    Returns the folder, the weight files that an object store is still to copy to `uri`, and what is known of the model.
    """
    names = [*sources.description(source.paths), *([CARD] if CARD in source.files else [])]
    sources.check_small(names, source.files)
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    for name, path in source.bring(names).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    weights = sources.choose_weights(source)
    if problems := weights.problems + in_sandbox("inspect", folder, [])["problems"]:
        raise DraftModelError(problems)
    if weights.kind == "safetensors" and weights.index:
        shutil.copyfile(source.bring([weights.index])[weights.index], folder / INDEX)
    remote = _headers(source, weights, folder, uri)
    if not remote:
        _bring_weights(source, weights, folder, work)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    facts = in_sandbox("inspect", folder, files)
    if problems := facts.pop("problems"):
        raise DraftModelError(problems)
    converted = "PyTorch weights, rewritten as safetensors" if weights.kind == "pickle" else ""
    return folder, remote, {**facts, "conversion": converted}


def in_sandbox(task: str, *arguments: Any, limits: Limits | None = None) -> Any:
    """Calls `inspect` or `convert` of `check` in a process with limits."""
    with Workers(limits=limits or LIMITS, stopped=_STOPPED) as worker:
        return worker.call(_run_task, task, *arguments)


def _run_task(task: str, *arguments: Any) -> Any:
    from draft_model.model_import import check  # loads torch, which the process of the stage does not need

    return getattr(check, task)(*arguments)


def _headers(source: Source, weights: Weights, folder: Path, uri: str) -> list[str]:
    """Brings only the weights' headers, with holes for the tensors, where an object store can copy the files itself."""
    between = all(place and storage.is_remote(place) for place in (source.listing.uri, uri))
    final = weights.kind == "safetensors" and (weights.index or weights.names == ["model.safetensors"])
    if not (between and final):
        return []
    for name in weights.names:
        file, size = storage.join(source.listing.uri, source.paths[name]), source.files[name].size or 0
        with (folder / name).open("wb") as header:
            if size > 8:
                length = int.from_bytes(start := storage.read_range(file, 0, 8), "little")
                header.write(start + storage.read_range(file, 8, min(max(length, 1), size, 10**8)))
            header.truncate(size)
    return weights.names


def _bring_weights(source: Source, weights: Weights, folder: Path, work: Path) -> None:
    downloads = not source.listing.uri or storage.is_remote(source.listing.uri)
    size = sum(source.files[name].size or 0 for name in weights.names)
    check_free_disk(work, size * (downloads + (weights.kind == "pickle")))
    paths = source.bring(weights.names)
    if weights.kind == "pickle":
        into, sizes = work / "converted", [path.stat().st_size for path in paths.values()]
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir()
        seconds = LIMITS.cpu + sum(sizes) // _CONVERTED_PER_SECOND
        limits = Limits(LIMITS.memory + 3 * max(sizes), seconds, 4 * seconds)
        in_sandbox("convert", [*paths.values()], into, limits=limits)
        paths = {path.name: path for path in sorted(into.iterdir())}
    for name, path in paths.items():
        (folder / ("model.safetensors" if len(paths) == 1 else name)).symlink_to(path.resolve())


def _upload(source: Source, folder: Path, uri: str, remote: list[str]) -> list[storage.FileRecord]:
    records: list[storage.FileRecord] = []
    if remote:
        below = source.paths[remote[0]].removesuffix(remote[0]).rstrip("/")
        folder_uri = storage.join(source.listing.uri, below) if below else source.listing.uri
        records += storage.copy(folder_uri, uri, remote)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != CARD and name not in remote:
            record = storage.put_file(path.resolve(), uri, name)
            stated = source.files[name].sha256 if path.is_symlink() and name in source.files else ""
            if stated and record.sha256 != stated:
                raise DraftModelError(
                    f"{source.parameter}: {name} of {source.name} arrived damaged: its SHA-256 is not the one that its "
                    "source states; remove the scratch folder and import again"
                )
            records.append(record)
    return records


def _licence(source: Source) -> str:
    """As the YAML header of the model card names it, else empty."""
    text = source.bring([CARD])[CARD].read_bytes()[:65536].decode(errors="replace") if CARD in source.paths else ""
    header = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
    found = re.search(r"^license:[ \t]*(?:\n\s*-[ \t]*)?[\"'\[]?([\w.+ -]+)", header, re.M)
    return found[1].strip() if found else ""
