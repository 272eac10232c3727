"""A tiny real target with a tokenizer, made on the spot: what whole-stage tests run on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()  # noqa: SIM905
)


def llama_config(**changes):
    """Configuration of a six-layer Llama of 32 hidden units."""
    from transformers import LlamaConfig

    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return LlamaConfig(**{**settings, **changes})


def llama(seed: int = 0, **changes):
    """A random six-layer Llama in float32 whose greedy replies are not all alike."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    return model


def conversations(count: int, seed: int = 0) -> list[dict]:
    """Conversations of one or two turns of Greek letters."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    rows = []
    for number in range(count):
        messages = []
        for _ in range(rng.randint(1, 2)):
            messages += [{"role": "user", "content": words(2, 6)}, {"role": "assistant", "content": words(4, 20)}]
        rows.append({"id": f"tiny-{seed}-{number}", "conversations": messages})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_target(folder: Path, seed: int = 0, **changes) -> Path:
    """A Transformers folder: a tiny Llama with a ChatML tokenizer trained on the Greek letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    core.train_from_iterator([" ".join(WORDS), *WORDS, "user\nassistant\nsystem\n"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    model = llama(
        seed, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **changes,
    )  # fmt: skip
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_run(folder: Path, uri: str = "", **more) -> dict:
    """Parameters of a run that takes as little as a real one can, whose inputs are in a folder, or copied to a URI."""
    from draft_model import storage

    write_target(folder / "target")
    write_jsonl(folder / "train.jsonl", conversations(24))
    write_jsonl(folder / "validation.jsonl", conversations(6, seed=1))
    (folder / "draft.json").write_text('{"draft_vocab_size": 200}')
    for file in (path for path in folder.rglob("*") if uri and path.is_file()):
        storage.put_file(file, uri, file.relative_to(folder).as_posix())
    return {
        "pytorch_model_path": f"{uri or folder}/target", "dataset_train_split": f"{uri or folder}/train.jsonl",
        "dataset_validation_split": f"{uri or folder}/validation.jsonl",
        "draft_model_config": f"{uri or folder}/draft.json", "chat_template": "qwen", "max_length": 64,
        "ttt_length": 2, "compute_dtype": "float32", "num_epochs": 2, "evaluation_conversations": 2,
        "evaluation_max_new_tokens": 8, **more,
    }  # fmt: skip
