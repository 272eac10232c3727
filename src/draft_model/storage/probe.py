"""Tries on a small scale what a run does with its store, by the same client."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path

from draft_model.errors import DraftModelError
from draft_model.storage import folders
from draft_model.storage.uri import join


def probe(uri: str, *, conditional: bool = True) -> list[str]:
    """Writes an object in parts, reads it in ranges, tries conditional writes, and removes all of it.

    Args:
        uri: folder that a run is to write to.
        conditional: whether the run needs conditional writes, as a lease does.

    Returns:
        What does not work, a sentence each; nothing where all does.
    """
    problems: list[str] = []
    folder = join(uri, f"probe-{uuid.uuid4().hex}")
    with tempfile.TemporaryDirectory() as work:
        try:
            (Path(work) / "large").write_bytes(data := os.urandom(9 * 2**20))
            folders.put_file(Path(work) / "large", join(folder, "large"))
            if folders.fetch_file(join(folder, "large"), Path(work, "back")).read_bytes() != data:
                problems.append(f"{uri}: an object of 9 MiB comes back with another content; see the log of the store")
            if conditional:
                problems += _conditional_writes(uri, join(folder, "lease"))
        except DraftModelError as error:
            problems += error.problems
        try:
            folders.remove(folder)
        except DraftModelError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    return problems


def _conditional_writes(uri: str, file: str) -> list[str]:
    made = [folders.create(file, b"first"), folders.create(file, b"second")]
    found = folders.read_versioned(file)
    wrong = folders.replace(file, b"third", '"0123456789abcdef0123456789abcdef"')
    right = found is not None and not wrong and folders.replace(file, b"fourth", found[1])
    if made == [True, False] and not wrong and right:
        return []
    name = "If-None-Match" if made != [True, False] else "If-Match"
    return [
        f"{uri}: the store does not obey conditional writes ({name}), which keep two runs out of one folder; use "
        "another store or a folder on a disk"
    ]
