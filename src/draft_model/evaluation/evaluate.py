"""evaluation.json: all that decoding measures of one draft."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draft_model.dataset.tokens import Split
from draft_model.drafts.eagle3.export import load_draft
from draft_model.drafts.eagle3.model import Eagle3Draft
from draft_model.errors import DraftModelError
from draft_model.evaluation import measure
from draft_model.evaluation.acceptance import acceptance, by_category, by_depth
from draft_model.evaluation.prediction import LONGEST, measure_costs, predict
from draft_model.evaluation.prompts import Prompts, choose_prompts
from draft_model.evaluation.speculative import Reply, Sampling, SpeculativeDecoder
from draft_model.evaluation.tree import DraftTree
from draft_model.parameters import Parameters
from draft_model.target.model import Target, load_target


@dataclass(frozen=True)
class Case:
    """What every decoding of an evaluation shares.

    Attributes:
        parameters: of the run.
        target: in float32.
        tokenizer: its.
        prompts: to decode.
        end_tokens: ids that end a reply.
        hardware: in words.
    """

    parameters: Parameters
    target: Target
    tokenizer: Any
    prompts: Prompts
    end_tokens: list[int]
    hardware: str

    def decode(
        self, draft: Eagle3Draft, tree: DraftTree, what: str, sampling: Sampling | None = None, limit: int | None = None
    ) -> tuple[list[Reply], float]:
        """Decodes the prompts, or the first so many; replies and seconds."""
        decoder = SpeculativeDecoder(self.target, draft, tree, self.end_tokens, sampling)
        return measure.decode(decoder, self.prompts.tokens[:limit], self.parameters.evaluation_max_new_tokens, what)


def open_case(p: Parameters, model: Path, dataset: Path | None, draft: Eagle3Draft, template: str) -> Case:
    """Loads the target and chooses the prompts.

    Args:
        p: of the run.
        model: local folder of the target.
        dataset: local folder of the data set; None where the prompts are given.
        draft: of the target; it says where features are taken and how long a context may be.
        template: name of the chat template, for a tokenizer that has none.

    Raises:
        DraftModelError: when something cannot be loaded.
    """
    from transformers import AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = load_target(model, draft.config.aux_layers, torch.float32, device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    split = Split(dataset / "validation") if dataset and (dataset / "validation").is_dir() else None
    ahead = p.evaluation_max_new_tokens + max(LONGEST, p.num_speculative_tokens) + 1
    longest = draft.config.max_position_embeddings - ahead
    prompts = choose_prompts(p.evaluation_prompts, split, tokenizer, template, p.evaluation_conversations, longest)
    return Case(p, target, tokenizer, prompts, _end_tokens(target.model), _hardware(device))


def evaluate(p: Parameters, model: Path, dataset: Path, final: Path, training: Mapping[str, Any]) -> dict[str, Any]:
    """Decodes the prompts with the trained draft, with an untrained one and without.

    Args:
        p: of the run.
        model: local folder of the target.
        dataset: local folder of the data set.
        final: local folder of the trained draft.
        training: its training.json.

    Returns:
        What evaluation.json holds; evaluation.schema.json describes it.
    """
    started = time.monotonic()
    report = json.loads((dataset / "report.json").read_text(encoding="utf-8"))
    trained = load_draft(final)
    case = open_case(p, model, dataset, trained, report["chat_template"])
    trained = trained.to(case.target.device)
    untrained = Eagle3Draft(trained.config, trained.t2d, trained.d2t).to(case.target.device)
    untrained.initialise(p.seed, case.target)
    tokens, chain = case.prompts.tokens, DraftTree.chain(p.num_speculative_tokens)
    own, alone = measure.reference(case.target, tokens, p.evaluation_max_new_tokens, case.end_tokens)
    replies, seconds = case.decode(trained, chain, "with trained draft")
    compared = measure.compare(case.target, tokens, replies, own)
    before, _ = case.decode(untrained, chain, "with untrained draft")
    compared = compared + measure.compare(case.target, tokens, before, own)
    more, also_compared = _more(case, trained, own)
    compared = compared + also_compared
    validation = training["validation"][-1] if training["validation"] else {}
    return {
        "num_speculative_tokens": p.num_speculative_tokens,
        "prompts": len(tokens),
        "prompts_source": case.prompts.source,
        "max_new_tokens": p.evaluation_max_new_tokens,
        "dtype": "float32",
        "hardware": case.hardware,
        "trained": acceptance(replies, p.num_speculative_tokens),
        "untrained": acceptance(before, p.num_speculative_tokens),
        "by_category": by_category(replies, case.prompts.categories),
        "by_depth": by_depth(replies),
        "more": more,
        "predicted_acceptance_length": validation.get("acceptance_length"),
        "prediction": _prediction(case, trained, validation.get("acceptance_length_by_proposals")),
        "wall_clock": _wall_clock(case, own, alone, replies, seconds),
        "lossless": {
            "prompts": len(tokens),
            "compared_tokens": compared.compared_tokens,
            "identical": not compared.differences,
            "ties": compared.ties,
            "differences": compared.differences,
        },
        "sample": _sample(case, replies),
        "prompt_tokens": tokens,
        "seconds": time.monotonic() - started,
    }


def _more(
    case: Case, draft: Eagle3Draft, own: Sequence[Sequence[int]]
) -> tuple[list[dict[str, Any]], measure.Comparison]:
    """The other way of decoding that may be asked for: sampling."""
    p, found, compared = case.parameters, [], measure.Comparison(0, [], [])
    tree = DraftTree.chain(p.num_speculative_tokens)
    ways = []
    if p.evaluation_temperature:
        shape = f"chain of {tree.depth}"
        ways.append((p.evaluation_temperature, f"{shape}, sampled at temperature {p.evaluation_temperature:g}"))
    for temperature, name in ways:
        replies, _ = case.decode(draft, tree, name, Sampling(temperature, p.seed) if temperature else None)
        found.append({"name": name, "proposals": tree.size - 1, **acceptance(replies, tree.depth)})
        if not temperature:
            compared = compared + measure.compare(case.target, case.prompts.tokens, replies, own)
    return found, compared


def _prediction(case: Case, draft: Eagle3Draft, trained: Sequence[float] | None) -> dict[str, Any]:
    replies, _ = case.decode(draft, DraftTree.chain(LONGEST), f"with {LONGEST} proposals", limit=measure.BATCH)
    measured = acceptance(replies, LONGEST)["conditional_acceptance_by_position"]
    longest = max(case.prompts.tokens, key=len)
    costs = measure_costs(case.target, draft, longest) | {"hardware": case.hardware, "dtype": "float32"}
    return {"prompts": len(replies), **predict(measured, trained, costs)}


def _wall_clock(
    case: Case, own: Sequence[Sequence[int]], alone: float, replies: Sequence[Reply], seconds: float
) -> dict[str, Any]:
    """Tokens per second with the draft and without, reading the prompts included."""
    without = sum(map(len, own)) / alone
    helped = sum(len(reply.tokens) for reply in replies) / seconds
    return {
        "target_alone_tokens_per_second": without,
        "tokens_per_second": helped,
        "speed_up": helped / without,
        "batch": measure.batch_size(case.target),
        "hardware": case.hardware,
        "dtype": "float32",
    }


def _hardware(device: torch.device) -> str:
    import platform

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _end_tokens(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    return [found] if isinstance(found, int) else list(found or [])


def _sample(case: Case, replies: Sequence[Reply]) -> dict[str, Any]:
    """The reply of median length, token by token."""
    middle = sorted(range(len(replies)), key=lambda index: len(replies[index].tokens))[len(replies) // 2]
    reply = replies[middle]
    texts = [case.tokenizer.decode([token]) for token in reply.tokens]
    return {
        "prompt": case.tokenizer.decode(case.prompts.tokens[middle]),
        "reply": [list(pair) for pair in zip(texts, reply.drafted, strict=True)],
    }
