"""The model card: a checkpoint's README.md as the Hugging Face Hub reads it, with commands to serve it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from draft_model.evaluation.report import environment, hub_source, target_name

_FOLDER = "THIS_FOLDER"
_TARGET = "TARGET"


def write_card(
    path: Path,
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    dataset: Mapping[str, Any],
    *,
    name: str,
) -> None:
    """Writes the card.

    Args:
        path: the Markdown file.
        training: what the training stage tells of itself; `target` may have `licence` and
            `revision` (the Hub's).
        evaluation: what decoding with the draft measured; None where there was nothing to decode.
        dataset: the data set's report.json.
        name: the model's, its title.
    """
    hub_id, revision = hub_source(training)
    drafted = evaluation["num_speculative_tokens"] if evaluation else training["parameters"]["num_speculative_tokens"]
    card_environment = environment()
    card_environment.filters["plain"] = plain
    text = card_environment.get_template("model_card.md.j2").render(
        header=yaml.safe_dump(_header(training, hub_id), sort_keys=False, allow_unicode=True),
        name=name,
        training=training,
        evaluation=evaluation,
        dataset=dataset,
        target=target_name(training),
        hub_id=hub_id,
        drafted=drafted,
        folder=_FOLDER,
        placeholder="" if hub_id else _TARGET,
        vllm=_vllm(hub_id or _TARGET, revision, drafted),
        sglang=_sglang(hub_id or _TARGET, revision, drafted),
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")


def plain(text: object) -> str:
    """Text that Markdown shows as it is, also in a table's cell.

    Args:
        text: anything; line breaks become spaces.
    """
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(text).split()))


def _header(training: Mapping[str, Any], hub_id: str) -> dict[str, Any]:
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if licence := training["target"].get("licence"):
        header["license"] = licence
    if hub_id:
        header["base_model"] = hub_id
    return header | {"tags": ["eagle3", "speculative-decoding"]}


def _vllm(target: str, revision: str, drafted: int) -> str:
    speculative = json.dumps({"method": "eagle3", "model": _FOLDER, "num_speculative_tokens": drafted})
    return _command("vllm", "serve", target, *_revision(revision), "--speculative-config", speculative)


def _sglang(target: str, revision: str, drafted: int) -> str:
    return _command(
        "python", "-m", "sglang.launch_server", "--model-path", target, *_revision(revision),
        "--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", _FOLDER,
        "--speculative-num-steps", drafted, "--speculative-eagle-topk", 1,
        "--speculative-num-draft-tokens", drafted + 1,
    )  # fmt: skip


def _revision(revision: str) -> tuple[str, ...]:
    return ("--revision", revision) if revision else ()


def _command(*words: object) -> str:
    """A shell command, an option a line."""
    return shlex.join(map(str, words)).replace(" --", " \\\n  --")
