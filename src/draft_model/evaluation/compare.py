"""Two drafts of one target side by side on the same prompts, whichever trainer they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draft_model import storage
from draft_model.drafts.eagle3.config import draft_config_for, with_overrides
from draft_model.drafts.eagle3.export import load_weights, vocabulary_of
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.errors import DraftModelError
from draft_model.evaluation import measure
from draft_model.evaluation.acceptance import acceptance, by_category
from draft_model.evaluation.evaluate import open_case
from draft_model.evaluation.tree import DraftTree
from draft_model.export import fetched
from draft_model.parameters import Parameters
from draft_model.target.model import Target
from draft_model.training.checkpoint import read_checkpoint


@dataclass(frozen=True)
class CompareConfig:
    """One comparison.

    Attributes:
        model: URI of the target, imported or a Transformers folder.
        dataset: URI of the data set whose validation split gives the prompts; empty where evaluation_prompts does.
        drafts: URIs of drafts of that target.
        work: scratch folder.
        parameters: of the evaluation, and chat_template for a tokenizer that has none.
    """

    model: str
    dataset: str
    drafts: tuple[str, ...]
    work: Path
    parameters: Parameters


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Decodes the same prompts with each draft.

    Args:
        config: what to compare.

    Returns:
        A record per draft: draft, acceptance as in evaluation.json, by_category, tokens_per_second, identical (to the
        target's own tokens) and hardware.

    Raises:
        DraftModelError: when there are no prompts, or a draft is not of the target or not of the known maths.
    """
    p = config.parameters
    if not config.dataset and not p.evaluation_prompts:
        raise DraftModelError("--dataset, --evaluation_prompts: neither is given; one must say what to decode")
    model = fetched(config.model, config.work / "model")
    dataset = storage.fetch(config.dataset, config.work / "dataset") if config.dataset else None
    drafts = [_draft(uri, model, config.work / f"draft_{place}") for place, uri in enumerate(config.drafts)]
    case = open_case(p, model, dataset, drafts[0], p.chat_template)
    tokens = case.prompts.tokens
    own, _ = measure.reference(case.target, tokens, p.evaluation_max_new_tokens, case.end_tokens)
    records = []
    for uri, draft in zip(config.drafts, drafts, strict=True):
        here = replace(case, target=Target(case.target.model, draft.config.aux_layers))
        chain = DraftTree.chain(p.num_speculative_tokens)
        replies, seconds = here.decode(draft.to(case.target.device), chain, f"with {uri}")
        records.append(
            {
                "draft": uri,
                **acceptance(replies, p.num_speculative_tokens),
                "by_category": by_category(replies, case.prompts.categories),
                "tokens_per_second": sum(len(reply.tokens) for reply in replies) / seconds,
                "identical": not measure.compare(here.target, tokens, replies, own).differences,
                "hardware": case.hardware,
            }
        )
    return records


def table(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The comparison as rows of text, the head first."""
    rows = [["", *(record["draft"] for record in records)]]
    rows.append(["acceptance length", *(f"{record['acceptance_length']:.3f}" for record in records)])
    for name, key in (("cumulative", "acceptance_by_position"), ("conditional", "conditional_acceptance_by_position")):
        for place in range(len(records[0][key])):
            values = (record[key][place] for record in records)
            rows.append([f"{name} acceptance at {place + 1}", *("-" if x is None else f"{x:.1%}" for x in values)])
    for place, category in enumerate(records[0]["by_category"]):
        lengths = (record["by_category"][place]["acceptance_length"] for record in records)
        rows.append([f"length, {category['category']}", *("-" if x is None else f"{x:.3f}" for x in lengths)])
    rows.append(["tokens per second", *(f"{record['tokens_per_second']:.1f}" for record in records)])
    return [*rows, ["the target's own tokens", *("yes" if record["identical"] else "NO" for record in records)]]


def _draft(uri: str, model: Path, work: Path) -> Eagle3Draft:
    """A draft of any known format, in the shape that its configuration and the target's give it."""
    loaded = read_checkpoint(uri, work)
    default = draft_config_for(json.loads((model / "config.json").read_text(encoding="utf-8")))
    try:
        shape = with_overrides(default, loaded.config)
    except DraftModelError as error:
        said = [problem.removeprefix("draft_model_config: ") for problem in error.problems]
        raise DraftModelError([f"{uri}: {problem}" for problem in said]) from error
    draft = Eagle3Draft(shape, *vocabulary_of(loaded.tensors, shape))
    load_weights(draft, loaded.tensors, uri)
    return draft
