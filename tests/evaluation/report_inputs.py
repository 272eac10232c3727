"""Inputs of report and card as a real run leaves them, of a size to be looked at."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from draft_model.dataset import vocabulary
from draft_model.dataset.report import Tally
from draft_model.engine import Counts
from draft_model.parameters import Parameters

Json = dict[str, Any]
POSITIONS = 7


def log_entry(step: int, noise: float) -> Json:
    progress = 1 - math.exp(-step / 250)
    conditional = [round((0.66 - 0.035 * i) * progress + noise, 4) for i in range(POSITIONS)]
    return {
        "step": step,
        "epoch": round(step / 198, 3),
        "loss": [round(9.8 - (6.9 - 0.28 * i) * progress + 6 * noise, 4) for i in range(POSITIONS)],
        "agreement": [round(share * 0.97**i, 4) for i, share in enumerate(conditional)],
        "alpha": [round(share * 0.93, 4) for share in conditional],
        "conditional_acceptance": conditional,
        "acceptance_length": round(1 + sum(math.prod(conditional[: i + 1]) for i in range(3)), 4),
    }


def make_training() -> Json:
    noise = np.random.default_rng(0)
    speed = {"learning_rate": 0.001, "grad_norm": 1.0, "tokens_per_second": 1}
    log = [log_entry(step, noise.normal(0, 0.008)) | speed for step in range(10, 793, 10)]
    for entry in log:
        warm = min(1.0, entry["step"] / 40)
        entry["learning_rate"] = 0.001 * warm * 0.5 * (1 + math.cos(math.pi * entry["step"] / 792))
        entry["grad_norm"] = round(40 * math.exp(-entry["step"] / 60) + 1.1 + abs(noise.normal(0, 0.2)), 3)
        entry["tokens_per_second"] = round(530 + noise.normal(0, 12), 1)
    parameters = Parameters(
        huggingface_id="HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f",
        dataset_train_split="examples/smollm2/train.jsonl.gz",
        dataset_validation_split="examples/smollm2/validation.jsonl.gz",
        draft_model_config="examples/smollm2/draft.json",
        num_epochs=4, max_length=512, chat_template="qwen", learning_rate=0.001,
    )  # fmt: skip
    return {
        "parameters": parameters.model_dump(),
        "draft": {
            "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "vocab_size": 49152,
            "draft_vocab_size": 8192, "eagle_aux_hidden_state_layer_ids": [2, 15, 27],
        },
        "target": {
            "source": "HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f", "architecture": "LlamaForCausalLM",
            "parameters": 134515008, "hidden_size": 576, "layers": 30,
        },
        "dataset": {},
        "steps": 792, "epochs": 4.0, "world_size": 1, "tokens": 1920464, "seconds": 3623.5,
        "tokens_per_second": 530.0, "draft_parameters": 9839232,
        "log": log, "draft_step": 792, "acceptance_length": 1.91,
        "best": {"step": 594, "epoch": 3, "acceptance_length": 1.95},
        "validation": [log_entry(step, -0.045) for step in (198, 396, 594, 792)],
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "draft_model": "0.0.1"},
        "hardware": "Intel(R) Xeon(R) CPU @ 2.60GHz, 2 cores, 8 GiB",
    }  # fmt: skip


def make_evaluation() -> Json:
    reply = "A rain|bow| ap|pears| when| sun|light| meets| drops| of| water|.\n\n| Each| drop| bends| the| light"
    reply += "| and| splits| it| into| its| colours|,| from| red| to| violet|.<end>"
    tokens = reply.replace("<end>", "|<end>").split("|")
    hardware = "Intel(R) Xeon(R) CPU @ 2.60GHz, 2 cores, 8 GiB"
    speed = [
        {
            "num_speculative_tokens": k, "batch_size": size, "target_alone_tokens_per_second": alone,
            "tokens_per_second": share * helped, "speed_up": share * helped / alone,
        }
        for k, share in ((1, 0.9), (2, 0.95), (3, 1.0), (4, 0.95), (5, 0.9))
        for size, alone, helped in ((1, 101.3, 137.8), (4, 310.0, 365.8))
    ]  # fmt: skip
    return {
        "engine": "vLLM 0.32.0", "hardware": hardware, "dtype": "float32", "seconds": 412.6,
        "num_speculative_tokens": 3, "prompts": 40, "max_new_tokens": 128, "prompts_source": "the validation split",
        "trained": Counts(2526, 7578, 2308, [1367, 660, 281]).report() | {"tokens": 4834},
        "untrained": Counts(4705, 14115, 129, [124, 5, 0]).report(),
        "by_category": [
            {"category": "first reply", "prompts": 30, "rounds": 1900, "acceptance_length": 1.9311},
            {"category": "later reply", "prompts": 10, "rounds": 626, "acceptance_length": 1.8612},
        ],
        "sampled": None,
        "speed": [row for row in speed if row["num_speculative_tokens"] == 3], "speed_by_proposals": speed,
        "recommended_num_speculative_tokens": 3, "timing": "in turn, run by run", "not_measured": [],
        "agreement": {
            "simulated": 1.9071, "measured": 1.9137, "rounds": 2526, "bound": 0.1, "agrees": True, "not_compared": "",
        },
        "prompt_tokens": [[1, 2, 3]],
        "predicted_acceptance_length": make_training()["validation"][-1]["acceptance_length"],
        "lossless": {
            "prompts": 40, "compared_tokens": 9631, "identical": True,
            "ties": [{"prompt": 17, "position": 63, "margin": 1.9e-06, "tie": True}],
            "differences": [],
        },
        "sample": {
            "prompt": "Explain in two sentences how a rainbow forms.",
            "reply": [[text, i % 3 != 0 and i % 7 != 4] for i, text in enumerate(tokens)],
        },
    }  # fmt: skip


def make_dataset(*, validation: bool = True) -> Json:
    """A report.json of the shape that the dataset stage writes, from its own counting."""
    random = np.random.default_rng(1)
    ids = np.arange(8192)
    tallies = {}
    for split, rows in (("train", 1577), ("validation", 96))[: 1 + validation]:
        tally = Tally.empty(49152, 512)
        tally.lengths += np.bincount(
            np.minimum(512, random.lognormal(5.55, 0.38, rows).astype(int) + 20), minlength=513
        )
        tally.supervised[:9000] = (6e4 / (np.arange(9000) + 3) ** 1.1).astype(int) * rows // 1577
        tally.truncated = int(tally.lengths[512])
        tallies[split] = tally
    tallies["train"].reasons.update({"not valid JSON": 2, "no assistant turn": 1})
    splits = {
        split: asdict(tally.summary(vocabulary.coverage(tally.supervised, ids))) | tally.details()
        for split, tally in tallies.items()
    }
    head = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n<|im_start|>user\n"
    return {
        "vocab_size": 49152, "draft_vocab_size": 8192, "chat_template": "qwen", "max_length": 512,
        "fingerprint": "5f1c" * 16,
        "splits": splits,
        "coverage_by_size": vocabulary.coverage_by_size(
            tallies["train"].supervised, tallies["validation"].supervised if validation else None
        ),
        "samples": [[
            [head, False], ["Name three rivers of Europe.", False],
            ["<|im_end|>\n<|im_start|>assistant\n", False],
            *([word, True] for word in ("The", " Danube", ", the", " Rhine", " and", " Don.", "<|im_end|>")),
            ["\n<|im_start|>user\nWhich is the longest?<|im_end|>\n<|im_start|>assistant\n", False],
            *([word, True] for word in ("The", " Danube", ":", " 2,850", " km", ".", "<|im_end|>")),
        ]],
    }  # fmt: skip


def make_report() -> Json:
    """Content of report.json."""
    return {
        "training": make_training(), "dataset": make_dataset(), "evaluation": make_evaluation(), "not_measured": "",
        "hashes": [],
    }  # fmt: skip
