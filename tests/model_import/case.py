"""What tests ask of an imported folder."""

import json

import torch

from draft_model import storage

TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
CANONICAL = {"config.json", "generation_config.json", "model.safetensors", *TOKENIZER}


def names(uri):
    return {file.path for file in storage.read_manifest(uri, stage="import").files}


def properties(uri):
    return storage.read_manifest(uri, stage="import").properties


def weights(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
