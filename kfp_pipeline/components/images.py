"""The container images of the steps, by kind, named once.

DRAFT_MODEL_IMAGES (`draft-model compile --image`) names those that a cluster can pull; the defaults belong to no
registry, so that nothing is ever pulled from a stranger.
"""

import os
from collections.abc import Sequence

from draft_model.errors import DraftModelError

KINDS = ("importer", "dataset", "trainer", "coordinator", "engine")
"""What containers/ builds. The trainer's has what the others have, so it can stand for each of them; it does for the
engine's, which has vLLM besides, where none is named: that one is built only when asked for."""

VARIABLE = "DRAFT_MODEL_IMAGES"
_DEFAULT = "localhost/pipeline-draft-model/{kind}:0.0.1"


def images_by_kind(given: Sequence[str]) -> dict[str, str]:
    """What each kind of step runs in; raises DraftModelError where a kind is unknown or has no image.

    `given` has images by tag or digest. `NAME` is for all kinds, and its `{kind}` stands for each of them; `KIND=NAME`
    is for one kind, and wins. The engine's is the trainer's where it has no line of its own.
    """
    named = dict(image.split("=", 1) for image in given if "=" in image)
    problems = [f"--image: given {kind}={name}; allowed kinds: {', '.join(KINDS)}"
                for kind, name in named.items() if kind not in KINDS]  # fmt: skip
    general = [image for image in given if "=" not in image]
    images = {kind: name.replace("{kind}", kind) for name in general for kind in KINDS if kind != "engine"} | named
    images.setdefault("engine", images.get("trainer", ""))
    if missing := [kind for kind in KINDS if not images.get(kind)]:
        problems.append(f"--image: no image for {', '.join(missing)}; add KIND=NAME, or NAME for all kinds")
    if problems:
        raise DraftModelError(problems)
    return images


IMAGES = images_by_kind(os.environ.get(VARIABLE, _DEFAULT).split())
