"""What is in each layer of an image, in the form in which it is saved and pushed."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

SECRETS = re.compile(
    rb"(?<![A-Z0-9])A[KS]IA[0-9A-Z]{16}(?![A-Z0-9])|(?<![A-Za-z0-9])hf_[A-Za-z0-9]{34}(?![A-Za-z0-9])"
    rb"|gh[pousr]_[A-Za-z0-9]{36}|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----\s*[A-Za-z0-9+/=\r\n]{64}"
    rb"|(?i:aws_secret_access_key|aws_session_token)\s*[=:]\s*[A-Za-z0-9/+]{40}"
)
"""Keys as AWS, Hugging Face and GitHub give them, private keys, and where credentials files have them."""
_BLOCK, _OVERLAP = 4 << 20, 4 << 10


def save(image, path: Path) -> Path:
    """Writes an image as `docker save` does."""
    with path.open("wb") as file:
        for chunk in image.save():
            file.write(chunk)
    return path


def members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Everything in every layer, also what a later layer hides."""
    with tarfile.open(path) as saved:
        for name in json.load(saved.extractfile("manifest.json"))[0]["Layers"]:
            with tarfile.open(fileobj=saved.extractfile(name), mode="r|*") as layer:
                for member in layer:
                    yield member, layer


def configuration(path: Path) -> str:
    """The image's configuration and history, as text."""
    with tarfile.open(path) as saved:
        config = json.load(saved.extractfile("manifest.json"))[0]["Config"]
        return saved.extractfile(config).read().decode()


def secrets(path: Path) -> list[str]:
    """What looks like a secret: file and beginning, of all layers and of the configuration."""
    found = [f"configuration: {match}" for match in SECRETS.findall(configuration(path).encode())]
    for member, layer in members(path):
        if member.isreg():
            file, tail = layer.extractfile(member), b""
            while block := file.read(_BLOCK):
                found += [f"{member.name}: {match[:12]!r}" for match in SECRETS.findall(tail + block)
                          if b"EXAMPLE" not in match]  # fmt: skip
                tail = block[-_OVERLAP:]
    return found
