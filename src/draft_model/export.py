"""One trained draft, written as each engine's own tools write theirs.

vLLM and SGLang both load what training leaves, where the feature layers stand twice, once in each engine's counting. An
export holds one engine's alone. `speculators` is the format of vLLM's library of that name: the same tensors, the layer
under `layers.0`, and a configuration that names the target, so that `vllm serve DRAFT` finds it by itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

from draft_model import drafts, storage
from draft_model.drafts.base import WEIGHTS
from draft_model.errors import DraftModelError

Format = Literal["vllm", "sglang", "speculators"]
FORMATS: tuple[Format, ...] = get_args(Format)

_LEFT_OUT = (
    "config.json",
    WEIGHTS,
    storage.MANIFEST,
    "report.html",
    "report.json",
    "evaluation.json",
    "training_state",
)


def export(draft: str, form: Format, output: str, work: Path, target: str = "", target_type: str = "") -> str:
    """Writes a draft for one engine; returns the URI of its folder.

    Args:
        draft: URI of a trained draft (`.../final`), or of one of another trainer.
        form: what to write.
        output: URI of the folder to write.
        work: scratch folder.
        target: what the engine is to load as the target, a Hub id or a path; only for `speculators`. Not given: what
            training.json names.
        target_type: `model_type` of the target; used where the draft does not name it.
    """
    from draft_model.drafts.files import write_draft
    from draft_model.training.checkpoint import read_checkpoint

    loaded = read_checkpoint(draft, work / "draft")
    folder = work / "exported"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(loaded.folder, folder, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    verifier = _target(loaded.folder, target, draft) if form == "speculators" else {}
    known = {"target_model_type": target_type} if target_type else {}
    family, config = drafts.family_of(loaded.config, draft), {**known, **loaded.config}
    try:
        config, tensors = family.export(config, loaded.tensors, form, verifier)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DraftModelError(
            f"{draft}: its config.json lacks, or has in another form, what {form} needs: {error}"
        ) from error
    write_draft(folder, config, tensors)
    storage.publish(folder, output, stage="export", properties={"format": form, "draft": draft})
    return output


def _target(folder: Path, given: str, draft: str) -> dict[str, Any]:
    """What the speculators format says of the target, and of how it is best served."""
    file = folder / "training.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known = record.get("target", {})
    if not (given or known.get("source")):
        raise DraftModelError(
            f"--target: not given, and {draft} has no training.json that names its target: give the target's Hub id "
            "or path"
        )
    return {
        "name": given or str(known["source"]).partition("@")[0],
        "architectures": [known["architecture"]] if known.get("architecture") else [],
        "proposals": record.get("parameters", {}).get("num_speculative_tokens", 3),
    }
