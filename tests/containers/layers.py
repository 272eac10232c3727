"""What is in each layer of images, in the form in which they are saved and pushed."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

SECRETS = {
    b"AKIA": rb"(?<![A-Za-z0-9/+])AKIA[0-9A-Z]{16}(?![A-Za-z0-9/+])",
    b"ASIA": rb"(?<![A-Za-z0-9/+])ASIA[0-9A-Z]{16}(?![A-Za-z0-9/+])",
    b"hf_": rb"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{34}(?![A-Za-z0-9])",
    b"ghp_": rb"(?<![A-Za-z0-9_])ghp_[A-Za-z0-9]{36}(?![A-Za-z0-9])",
    b"PRIVATE KEY-----": rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{64}",
    b"aws_secret_access_key": rb"aws_secret_access_key\s*=\s*[A-Za-z0-9/+]{40}",
    b"AWS_SECRET_ACCESS_KEY": rb"AWS_SECRET_ACCESS_KEY=[A-Za-z0-9/+]{40}",
}
"""Keys as AWS, Hugging Face and GitHub give them, private keys, and credentials files: a word, and then the whole."""
PUBLISHED = re.compile(rb"EXAMPLE")
"""In AWS' documentation, which botocore has."""
SELF_TESTS = re.compile(r"/libgnutls\.so[.\d]*$|/transformers/(__pycache__/)?testing_utils\.")
"""Have keys for their own tests, which everybody has."""
_BLOCK, _OVERLAP = 4 << 20, 4 << 10


@dataclass(frozen=True)
class Saved:
    """An image as it was saved.

    Attributes:
        configuration: JSON, with the history.
        members: everything in every layer, also what a later layer hides.
        secrets: what looks like one in a layer or in the configuration: where, and how it begins.
    """

    configuration: str
    members: list[tarfile.TarInfo]
    secrets: list[str]


def read(images: list[str], path: Path) -> list[Saved]:
    """Saves images and reads them; a layer that several have is read once.

    Args:
        images: names.
        path: file to save to.
    """
    subprocess.run(["docker", "save", "--output", path, *images], check=True)
    layers, found = {}, {}
    with tarfile.open(path) as saved:
        for image in json.load(saved.extractfile("manifest.json")):
            for name in image["Layers"]:
                layers[name] = layers.get(name) or _layer(saved.extractfile(name))
            configuration = saved.extractfile(image["Config"]).read().decode()
            members = [member for name in image["Layers"] for member in layers[name][0]]
            secrets = [secret for name in image["Layers"] for secret in layers[name][1]]
            secrets += [f"configuration: {secret!r}" for secret in _secrets(configuration.encode())]
            found |= dict.fromkeys(image["RepoTags"], Saved(configuration, members, secrets))
    return [found[name] for name in images]


def _layer(stream) -> tuple[list[tarfile.TarInfo], list[str]]:
    members, secrets = [], []
    with tarfile.open(fileobj=stream, mode="r|*") as layer:
        for member in layer:
            members.append(member)
            if member.isreg() and not SELF_TESTS.search(member.name):
                file, tail = layer.extractfile(member), b""
                while block := file.read(_BLOCK):
                    secrets += [f"{member.name}: {secret!r}" for secret in _secrets(tail + block)]
                    tail = block[-_OVERLAP:]
    return members, secrets


def _secrets(data: bytes) -> list[bytes]:
    whole = [secret for word, pattern in SECRETS.items() if word in data for secret in re.findall(pattern, data)]
    return [secret[:12] for secret in whole if not PUBLISHED.search(secret)]
