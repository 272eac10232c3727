"""A model's weight files: which of them count, what their headers say, and shards that engines can load.

A safetensors file is a header (name, type, shape and range of every tensor) and the tensors' bytes. The header alone
shows whether a file is whole, and lets a large file be split into shards that are ranges of it: no byte is copied here.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from draft_model.model_import import hub
from draft_model.model_import.sources import read
from draft_model.storage import BytesContent, Content, JoinedContent, Piece

MAX_SHARD = 5 * 10**9
"""Bytes; larger files are split, as the Hub recommends."""
INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
_LONGEST_HEADER = 100 * 10**6
_PICKLE_ENDINGS = (".bin", ".pt", ".pth")
_TRAINING_FILES = ("optimizer", "scheduler", "training_args", "trainer_state", "rng_state", "scaler")

Kind = Literal["safetensors", "pickle", "gguf"]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        start: where the tensors' bytes begin.
        tensors: dtype, shape and data_offsets by name, in the order of their bytes.
        metadata: of the file.
    """

    start: int
    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Choice:
    """The weight files of a folder.

    Attributes:
        kind: their format.
        names: the files.
        index: says which tensor is in which file; None where there is one file, or no index.
    """

    kind: Kind
    names: list[str]
    index: str | None = None


def choose(files: Mapping[str, Content], problems: list[str]) -> Choice:
    """Which files hold the weights: safetensors, else PyTorch's, else one GGUF file; never two kinds.

    Args:
        files: of the model's folder.
        problems: what is wrong is added.
    """
    for kind, index, one, endings in (
        ("safetensors", INDEX, _ONE_FILE, (".safetensors",)),
        ("pickle", "pytorch_model.bin.index.json", "pytorch_model.bin", _PICKLE_ENDINGS),
    ):
        if index in files:
            return Choice(kind, _indexed(files, index, problems), index)  # type: ignore[arg-type]
        if one in files:
            return Choice(kind, [one])  # type: ignore[arg-type]
        found = sorted(name for name in files if name.endswith(endings) and not name.startswith("consolidated"))
        if kind == "pickle":
            found = [name for name in found if not name.startswith(_TRAINING_FILES)]
        if found:
            return Choice(kind, found)  # type: ignore[arg-type]
    gguf = sorted(name for name in files if name.endswith(".gguf"))
    if len(gguf) == 1:
        return Choice("gguf", gguf)
    if gguf:
        problems.append(f"it has {len(gguf)} GGUF files ({', '.join(gguf[:3])}, ...): give the URI of one of them")
    else:
        problems.append("it has no weights (safetensors, PyTorch's .bin, .pt or .pth, or GGUF)")
    return Choice("safetensors", [])


def _indexed(files: Mapping[str, Content], index: str, problems: list[str]) -> list[str]:
    try:
        names = sorted({str(name) for name in json.loads(read(files[index]))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"its {index} cannot be read: {error}")
        return []
    problems += [f"{index} names {name}, which is not beside it" for name in names if "/" in name]
    beside = [name for name in names if "/" not in name]
    problems += [f"{name} is missing, which {index} names" for name in beside if name not in files]
    return [name for name in beside if name in files]


def read_header(content: Content) -> Header:
    """Reads the header of a safetensors file, and nothing else of it.

    Raises:
        ValueError: where the file is none, damaged or cut short.
    """
    size = content.size
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    (length,) = struct.unpack("<Q", content.read(0, 8))
    if length > min(size - 8, _LONGEST_HEADER):
        raise ValueError("its header is longer than the file")
    found = json.loads(content.read(8, length))
    if not isinstance(found, dict):
        raise ValueError("its header is no JSON object")
    metadata = found.pop("__metadata__", None) or {}
    try:
        tensors = dict(sorted(found.items(), key=lambda item: (item[1]["data_offsets"], item[0])))
        end = 0
        for name, tensor in tensors.items():
            first, last = tensor["data_offsets"]
            math.prod(tensor["shape"])
            if first != end or last < first:
                raise ValueError(f"tensor {name} does not begin where the one before it ends")
            end = last
    except (KeyError, TypeError) as error:
        raise ValueError(f"its header is damaged ({error})") from error
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes where its header says {8 + length + end}")
    return Header(8 + length, tensors, metadata)


def headers_of(files: Mapping[str, Content], names: Sequence[str], problems: list[str]) -> dict[str, Header]:
    """The headers of several files.

    Args:
        files: of the model's folder.
        names: safetensors files.
        problems: what is wrong is added.
    """
    found = {}
    for name in names:
        try:
            found[name] = read_header(files[name])
        except ValueError as error:
            problems.append(f"{name} is damaged or cut short: {error}")
    return found


def canonical(
    files: Mapping[str, Content], choice: Choice, headers: Mapping[str, Header], max_shard: int = MAX_SHARD
) -> dict[str, Content]:
    """The weights as the canonical folder has them: one file, or shards of at most 5 GB with an index.

    Args:
        files: of the model's folder.
        choice: the safetensors files.
        headers: of these.
        max_shard: bytes.
    """
    large = [name for name in choice.names if files[name].size > max_shard]
    if not large and choice.index:
        return {name: files[name] for name in (*choice.names, choice.index)}
    shards: list[tuple[Content, dict[str, dict[str, Any]]]] = []
    for name in choice.names:
        if name in large:
            shards += _split(hub.keep(files[name]), headers[name], max_shard)
        else:
            shards.append((files[name], headers[name].tensors))
    if len(shards) == 1:
        return {_ONE_FILE: shards[0][0]}
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    where = {tensor: name for name, (_, tensors) in zip(names, shards, strict=True) for tensor in tensors}
    total = sum(_length(tensor) for _, tensors in shards for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    made: dict[str, Content] = {name: content for name, (content, _) in zip(names, shards, strict=True)}
    return {**made, INDEX: BytesContent(f"{json.dumps(index, indent=2)}\n".encode())}


def _length(tensor: Mapping[str, Any]) -> int:
    first, last = tensor["data_offsets"]
    return int(last) - int(first)


def _split(content: Content, header: Header, max_shard: int) -> list[tuple[Content, dict[str, dict[str, Any]]]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in header.tensors.items():
        if groups[-1] and filled + _length(tensor) > max_shard:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += _length(tensor)
    return [_range(content, header, group) for group in groups]


def _range(content: Content, header: Header, names: list[str]) -> tuple[Content, dict[str, dict[str, Any]]]:
    begin = header.tensors[names[0]]["data_offsets"][0]
    end = header.tensors[names[-1]]["data_offsets"][1]
    tensors = {
        name: {**header.tensors[name], "data_offsets": [at - begin for at in header.tensors[name]["data_offsets"]]}
        for name in names
    }
    said = {"__metadata__": header.metadata, **tensors} if header.metadata else tensors
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = BytesContent(struct.pack("<Q", len(text)) + text)
    pieces = [Piece(start, 0, start.size), Piece(content, header.start + begin, end - begin)]
    return JoinedContent(pieces), tensors


def write_skeleton(folder: Path, weights: Mapping[str, Content]) -> None:
    """Writes the weights' headers, with holes where the tensors are: they take no disk, and open as the files do.

    Args:
        folder: where to.
        weights: of `canonical`.
    """
    for name, content in weights.items():
        path = folder / name
        if name.endswith(".json"):
            path.write_bytes(read(content))
            continue
        (length,) = struct.unpack("<Q", content.read(0, 8))
        path.write_bytes(content.read(0, 8 + length))
        os.truncate(path, content.size)
