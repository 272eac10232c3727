"""What one kind of image holds: the part of requirements.lock that its group in pyproject.toml comes to.

    .venv/bin/python containers/requirements.py KIND cpu|cuda [hashes]

prints a requirements file; with `hashes` one of all but torch, with the hashes of the lock file. What a package needs
is asked of the packages that are installed beside this Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LEFT_OUT = {"setuptools"}
"""torch names it, for the building of extensions."""


def locked(text: str) -> dict[str, str]:
    """Versions by canonical name, of the text of a lock file."""
    pins = (line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version.partition(";")[0].strip(" \\") for name, version in pins}


def group(project: dict[str, Any], name: str) -> list[str]:
    """Requirements of a dependency group, with the project's own extras, and of the groups that it includes."""
    own = {canonicalize_name(Requirement(line).name): line for line in project["project"]["dependencies"]}
    found = []
    for entry in project["dependency-groups"][name]:
        found += group(project, entry["include-group"]) if isinstance(entry, dict) else [own.get(entry, entry)]
    return found


def closure(names: list[str]) -> set[str]:
    """Canonical names of packages and of all that they need on this platform."""
    seen: set[tuple[str, str]] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if name in LEFT_OUT or (name, extra) in seen:
                continue
            seen.add((name, extra))
            needed = map(Requirement, requires(name) or ())
            todo += [n for n in needed if n.marker is None or n.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def requirements(kind: str, torch: str) -> list[str]:
    """Lines of the requirements file.

    Args:
        kind: of image.
        torch: `cpu` or `cuda`; the first is a build of its own, which a package index has beside the other or not.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = project["dependency-groups"]
    if kind not in groups or torch not in ("cpu", "cuda"):
        sys.exit(f"requirements.py: given {kind!r} {torch!r}; allowed: one of {', '.join(groups)}, and cpu or cuda")
    locks = (ROOT / "requirements-torch.lock", ROOT / "requirements.lock")
    versions = locked("".join(lock.read_text(encoding="utf-8") for lock in locks))
    names = sorted(closure(group(project, kind)))
    if unknown := [name for name in names if name not in versions]:
        sys.exit(f"the lock files have no {', '.join(unknown)}: run `make lock`")
    lines = {name: f"{name}=={versions[name]}" for name in names}
    if kind == "engine":
        del lines["torch"]  # vLLM's environment has it
    elif "torch" in lines:
        lines["torch"] = f"torch=={versions['torch']}+cpu" if torch == "cpu" else f"torch==={versions['torch']}"
    return list(lines.values())


def with_hashes(lines: list[str]) -> list[str]:
    """The lock file's entries of these requirements, without torch, which it does not have."""
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text(encoding="utf-8"))
    by_name = {canonicalize_name(entry.partition("==")[0]): entry.rstrip() for entry in entries}
    return [by_name[name] for name in (line.partition("==")[0] for line in lines) if name != "torch"]


if __name__ == "__main__":
    found = requirements(*sys.argv[1:3])
    print("\n".join(with_hashes(found) if sys.argv[3:] else found))
