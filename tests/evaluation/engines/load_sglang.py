"""What SGLang's own model classes read of block drafts and compute with them.

SGLang is unpacked, not installed: it needs a GPU. So its layers run their plain PyTorch form, attention is written out
here, and packages that it imports and nothing here uses are empty stand-ins.

Usage: python load_sglang.py UNPACKED_WHEEL DRAFT..., folders that have case.safetensors, too: the target's features of
a prompt, embedding and head, the token after the prompt, SGLang's number of draft tokens. Each gets found.safetensors
"""

import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path

import torch
import transformers.modeling_utils  # before the stand-ins, which must not pass for the real packages
from safetensors.torch import load_file, save_file
from torch.nn import functional

ABSENT = ("orjson", "IPython", "torchvision", "sgl_kernel", "torchao", "gguf")


class Anything(type):
    """A class with whatever attribute is asked for."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__init__": lambda *_, **__: None})


class StandIn(types.ModuleType):
    """A module with whatever attribute is asked for."""

    __path__ = ()
    __getattr__ = Anything.__getattr__


class Finder:
    """Makes the stand-ins."""

    def find_spec(self, name, *_):
        """For each of ABSENT."""
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None

    def create_module(self, spec):
        """An empty one."""
        return StandIn(spec.name)

    def exec_module(self, module):
        """Nothing."""


class Attend(torch.nn.Module):
    """In place of attention over the key cache: each position of a block sees the context and the whole block."""

    def __init__(self, layer, context):
        super().__init__()
        k, v = layer.kv_proj_only(context)
        self.context = layer.apply_k_rope(torch.arange(len(k)), layer.apply_k_norm(k)), v
        self.size, self.scale = layer.head_dim, layer.scaling

    def forward(self, q, k, v, _batch):
        """[S, heads * d] of each to [S, heads * d]."""
        both = (torch.cat(pair) for pair in zip(self.context, (k, v), strict=True))
        heads = (x.unflatten(-1, (-1, self.size)).transpose(0, 1) for x in (q, *both))
        out = functional.scaled_dot_product_attention(*heads, scale=self.scale, enable_gqa=True)
        return out.transpose(0, 1).flatten(1)


os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_RAGGED_VERIFY_MODE": "cap-accept"}  # which reads the confidence
wheel, *drafts = sys.argv[1:]
sys.path.insert(0, wheel)
sys.meta_path.append(Finder())

from sglang.srt.models import dflash, dspark  # noqa: E402
from sglang.srt.runtime_context import get_context, get_parallel  # noqa: E402
from sglang.srt.speculative.dspark_components.dspark_config import resolve_runtime_config  # noqa: E402


@torch.no_grad()
def read(folder):
    """Loads a draft as SGLang does and has it propose one block."""
    config = transformers.AutoConfig.from_pretrained(folder)
    (name,) = config.architectures
    model = next(x for x in (*dflash.EntryClass, *dspark.EntryClass) if x.__name__ == name)(config)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    model.load_weights(load_file(folder / "model.safetensors").items())
    for module in model.modules():
        if hasattr(module, "forward_native"):
            module.forward = module.forward_native
    case = load_file(folder / "case.safetensors")
    context, anchor = model.project_target_hidden(case["features"]), case["anchor"]
    for layer in model.layers:
        layer.self_attn.attn = Attend(layer.self_attn, context)
    ids = torch.full((model.block_size,), model.draft_config.mask_token_id)
    ids[0] = anchor
    positions = len(context) + torch.arange(len(ids))
    hidden = model(ids, positions, None, case["embedding"][ids]).hidden_states
    found = {"hidden": hidden}
    said = {"class": name, "layers": model.draft_config.target_layer_ids, "block": model.block_size,
            "numbers": sum(parameter.numel() for parameter in model.parameters())}  # fmt: skip
    if name == "DFlashDraftModel":
        tokens = (hidden[1:] @ case["head"].T).argmax(-1)
    else:
        chain = [anchor]
        for logits in hidden[not model.sample_from_anchor :] @ case["head"].T:
            bias, _ = model.markov_head.step_bias(chain[-1], hidden_states=None, state=None)
            chain.append((logits + bias).argmax())
        tokens = torch.stack(chain[1:])
        found["confidence"], _ = model.confidence_head.predict(
            hidden, anchor_tokens=anchor, draft_tokens=tokens.unsqueeze(0), markov_head=model.markov_head
        )
        said["block"] = resolve_runtime_config(
            draft_hf_config=config, speculative_num_draft_tokens=int(case["drafted"]),
            target_vocab_size=len(case["head"]),
        ).gamma  # fmt: skip
    save_file({**found, "tokens": tokens}, folder / "found.safetensors")
    return said


get_context().override_server_args().install()
get_parallel().override_permanently(tp_size=1, tp_rank=0, tp_group=None)
print(json.dumps([read(Path(folder)) for folder in drafts]))
