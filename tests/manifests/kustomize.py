"""What kustomize makes of the tree under manifests/."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (MANIFESTS / "components").iterdir())
KUBECTL = shutil.which("kubectl")
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")


@cache
def build(folder: Path) -> list[dict]:
    """The objects that a folder comes to."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def overlay(name: str) -> list[dict]:
    """The objects of an overlay."""
    return build(MANIFESTS / "overlays" / name)


def write(folder: Path, namespace: str, resources: list[Path], components: tuple[str, ...] = ()) -> Path:
    """A kustomization of one's own over parts of the tree, as somebody would write who adopts it."""
    document = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": [os.path.relpath(path, folder.resolve()) for path in resources],
        "components": [os.path.relpath(MANIFESTS / "components" / name, folder.resolve()) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))
    return folder


def pods_of(documents: list[dict]) -> dict[str, dict]:
    """Pod templates by the name of what has them."""
    found = {}
    for document in documents:
        if document["kind"] == "Job":
            found[document["metadata"]["name"]] = document["spec"]["template"]
    return found


def one(documents: list[dict], kind: str, name: str = "") -> dict:
    """The one object of a kind, or of that name."""
    (found,) = [d for d in documents if d["kind"] == kind and name in ("", d["metadata"]["name"])]
    return found
