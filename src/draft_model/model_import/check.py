"""What reads a stranger's model, in a process with limits: whether it can be a target, and PyTorch's weight files.

The structure decides. transformers opens the model on the meta device, so one of any size takes little memory. Code of
its repository is never run, and settings by which a later reader would run some are taken out of its files. A PyTorch
file is a pickle, and a pickle is a program: it is read with `weights_only=True`, which knows tensors and containers and
nothing else.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_outputs import MoeModelOutputWithPast

from draft_model.drafts import DEFAULT, family
from draft_model.drafts.layers import rotary_table
from draft_model.errors import DraftModelError
from draft_model.model_import.sources import INDEX
from draft_model.target.model import head_logits

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_QUANTISED = ("fp8", "mxfp4")  # what transformers reads alone, and dequantises where a GPU cannot run it
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")  # what engines apply in a draft, too
_STATEFUL = {"linear_attention", "conv", "hybrid", "hybrid_sliding"} | {
    f"{kind}_attention" for kind in ("compressed_sparse", "heavily_compressed")
}
_CODE = {"auto_map", "custom_pipelines"} | {
    f"{prefix}{kind}_implementation{suffix}"  # may name a kernel of the Hub
    for kind in ("attn", "experts") for prefix in ("", "_") for suffix in ("", "_internal", "_autoset")
}  # fmt: skip
_ORIGINAL = "Use the model that it was made from: the draft serves both"
_LACK = "its weights lack {}; save the whole model again"


def inspect(folder: Path, weights: list[str]) -> dict[str, Any]:
    """Checks configuration, structure, tokenizer, chat templates and the named weight files of a folder.

    Weights may be headers with holes for the tensors, or not here yet. JSON files that name code to run are rewritten;
    several weight files without an index get one. Returns `problems`, and where there are none what ImportResult says.
    """
    model = None
    try:
        config, own_code = _without_code(folder / "config.json")
        others = [folder / name for name in ("generation_config.json", "tokenizer_config.json")]
        read = {file.name: _without_code(file)[0] for file in others if file.exists()}
        if not (problems := _config_problems(config) + _end_problems({"config.json": config, **read})):
            model = _open(folder, config, own_code)
            problems = _structure_problems(model)
            if weights and not problems:
                problems = _weight_problems(folder, weights, model)
    except DraftModelError as error:
        problems = error.problems
    problems += _tokenizer_problems(folder, loads=model is not None)
    if problems or model is None:
        return {"problems": problems}
    return {
        "problems": [],
        "architecture": type(model).__name__,
        "parameter_count": model.num_parameters(),
        "quantization": _quantisation(config),
        "max_positions": int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0),
    }


def _without_code(path: Path) -> tuple[dict[str, Any], bool]:
    """Takes settings out of a JSON file that would have code run; gives the rest, and whether it had `auto_map`."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if key not in _CODE}
        return [clean(item) for item in value] if isinstance(value, list) else value

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        cleaned = clean(content)
    except (OSError, ValueError, RecursionError) as error:
        raise DraftModelError(f"its {path.name} cannot be read: {_first_line(error)}") from error
    if cleaned != content:
        path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return cleaned, "auto_map" in content


def _config_problems(config: dict[str, Any]) -> list[str]:
    draft = family(DEFAULT).default_shape(config)
    problems: list[str] = []
    if (method := _quantisation(config)) and method not in _QUANTISED:
        problems.append(
            f"it is quantised by {method!r} (quantization_config), which cannot be trained on here; allowed: none, "
            f"{', '.join(_QUANTISED)}. {_ORIGINAL}"
        )
    rope = str(draft.rope_parameters.get("rope_type", "default"))
    try:
        if rope not in _ROPE_TYPES:
            raise ValueError(f"allowed: {', '.join(_ROPE_TYPES)}")
        table = rotary_table(draft, torch.device("cpu"), 2, torch.float32)
        if table.shape[-1] != draft.head_dim:
            raise ValueError(f"it rotates {table.shape[-1]} of a head's {draft.head_dim} dimensions")
    except Exception as error:  # settings may make transformers raise anything
        problems.append(f"its rotary embedding (rope_type {rope!r}) cannot be a draft's, too: {_first_line(error)}")
    return problems


def _end_problems(read: dict[str, dict[str, Any]]) -> list[str]:
    """Whether the evaluation will know which tokens end a reply."""
    ends = {name: content.get("eos_token_id") for name, content in read.items() if name != "tokenizer_config.json"}
    return [
        f"its {name} has the eos_token_id {value!r:.40}; allowed: a token's id, a list of such, or null"
        for name, value in ends.items()
        if not all(type(each) is int for each in (value if isinstance(value, list) else [value or 0]))
    ]


def _quantisation(config: dict[str, Any]) -> str:
    """What the weights are quantised by; empty where they are not."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if not isinstance(found, dict):
        return str(found or "")
    old = any(found.get(f"load_in_{bits}bit") for bits in (4, 8))  # of bitsandbytes, before it named itself
    return str(found.get("quant_method") or ("bitsandbytes" if old else "unknown")) if found else ""


def _open(folder: Path, config: dict[str, Any], own_code: bool) -> Any:
    """The model on the meta device, without weights."""
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # a configuration may make transformers raise anything
        raise DraftModelError(
            "it needs code from its repository (trust_remote_code), which is never run here"
            if own_code
            else f"model_type {config.get('model_type')!r} is no decoder for text generation that transformers loads: "
            f"{_first_line(error)}"
        ) from error


def _structure_problems(model: Any) -> list[str]:
    start = f"{type(model).__name__} ({model.config.model_type}) is no decoder-only model of Llama's structure: "
    if getattr(model.config, "is_encoder_decoder", False):
        return [f"{start}it has an encoder"]
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or []) & _STATEFUL
    if kinds or getattr(model, "_is_stateful", False):
        return [
            f"{start}it has layers with a recurrent state ({', '.join(sorted(kinds)) or 'state space'}), which cannot "
            "be rolled back after a rejected proposal here; allowed: full, sliding or chunked attention in every layer"
        ]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not getattr(decoder, "layers", None) or getattr(getattr(decoder, "norm", None), "weight", None) is None:
        return [f"{start}it has not both decoder layers and a final norm"]
    if getattr(model.get_output_embeddings(), "weight", None) is None or model.get_input_embeddings() is None:
        return [f"{start}it has no input embedding or no output head"]
    return _head_problems(model, start)


def _head_problems(model: Any, start: str) -> list[str]:
    """Whether the logits are what the training takes them for, by the model's own forward pass.

    Its decoder is replaced by one that returns known states, its head by a small one.
    """
    decoder, old = model.get_decoder(), model.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 3, old.weight.shape[1], generator=generator)
    head = torch.nn.Linear(old.weight.shape[1], 16, bias=getattr(old, "bias", None) is not None)
    forward = decoder.forward
    try:
        model.set_output_embeddings(head)
        decoder.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=states)
        with torch.no_grad():
            for weight in head.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
            logits = model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False).logits
            expected = head_logits(states, head.weight, head.bias, model.config.get_text_config())
        if not torch.allclose(logits.float(), expected, rtol=1e-3, atol=1e-3):
            return [f"{start}its logits are no plain function of its head that the training knows"]
    except Exception as error:  # a forward pass may raise anything
        return [f"{start}its head cannot be taken apart from its decoder ({_first_line(error)})"]
    finally:
        decoder.forward = forward
        model.set_output_embeddings(old)
    return []


def _weight_problems(folder: Path, names: list[str], model: Any) -> list[str]:
    """Has transformers load the headers: a tensor that no file holds would be drawn at random without a word."""
    where: dict[str, str] = {}
    problems: list[str] = []
    packed: list[str] = []
    quantised = any(getattr(of, "quantization_config", None) for of in (model.config, model.config.get_text_config()))
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors = list(file.keys())
                packed += [] if quantised else [tensor for tensor in tensors if _is_packed(file, tensor)]
            where |= dict.fromkeys(tensors, name)
        except (SafetensorError, OSError) as error:
            problems.append(f"{name} is damaged or cut short: {_first_line(error)}")
    if problems or packed:
        sentence = f"its weights {{}} are quantised, but config.json has no quantization_config. {_ORIGINAL}"
        return problems or _named(packed, sentence)
    if len(names) > 1 and not (folder / INDEX).exists():
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=2), encoding="utf-8")
    try:
        _, info = AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", output_loading_info=True, use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # transformers raises anything, such as where one of the experts that it joins lacks
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        missing = revert_weight_conversion(model, model.state_dict()).keys() - where.keys() - tied
        return _named(sorted(missing), _LACK) or [f"transformers cannot load its weights: {_first_line(error)}"]
    mismatched = sorted(info["mismatched_keys"])
    other = [f"{name} {list(had)}, where config.json asks for {list(wanted)}" for name, had, wanted in mismatched]
    shapes = _named(other, "its weights have another shape than its config.json says: {}")
    return _named(sorted(info["missing_keys"]), _LACK) + shapes


def _is_packed(file: Any, name: str) -> bool:
    """Whether a tensor is quantised: transformers would read FP8 without its scales, and miss what has another name."""
    packed = name.endswith((".qweight", ".weight_packed"))  # GPTQ and AWQ, compressed-tensors
    return packed or str(file.get_slice(name).get_dtype()).startswith(("F8", "F6", "F4"))


def _named(names: list[str], sentence: str) -> list[str]:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [sentence.format(", ".join(names[:5]) + more)] if names else []


def _tokenizer_problems(folder: Path, loads: bool) -> list[str]:
    if not any((folder / file).exists() for file in _TOKENIZERS):
        return ["it has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)"]
    if not loads:  # transformers reads config.json for the tokenizer too
        return []
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("a").input_ids:
            raise ValueError("it makes no tokens of text")
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes tokenizers raise anything
        return [f"its tokenizer cannot be loaded ({_first_line(error)}); save it again with save_pretrained"]
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {None: tokenizer.chat_template}
    for name in named:  # one that never ends, or fills the memory, ends here; what it refuses is the data set's matter
        with suppress(Exception):
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=name, tokenize=False)
    return []


def convert(paths: list[Path], into: Path) -> None:
    """Writes the tensors of PyTorch files as safetensors into an existing folder, a file for each."""
    for number, path in enumerate(paths, 1):
        name = "model" if len(paths) == 1 else f"model-{number:05}-of-{len(paths):05}"
        save_file(_tensors(path), into / f"{name}.safetensors", metadata={"format": "pt"})


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    content = _load(path)
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise DraftModelError(f"{path.name} holds no state_dict (tensors by name): save the model with save_pretrained")
    seen: set[int] = set()
    tensors = {}
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            start = value.untyped_storage().data_ptr()
            shared = start in seen  # safetensors stores no tensor that shares memory with another
            tensors[str(name)] = value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
            seen.add(start)
    return tensors


def _load(path: Path) -> Any:
    try:
        mapped = zipfile.is_zipfile(path)  # files of before PyTorch 1.6 are none
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)|(?:class|function|global) ([\w.]+)", str(error))
        wanted = f"it asks for {named[1] or named[2]}" if named else _first_line(error)
        raise DraftModelError(
            f"{path.name} holds more than tensors, which is never run here ({wanted}): save the model's state_dict, or "
            "the model with save_pretrained, which writes safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        raise DraftModelError(f"{path.name} is damaged or no PyTorch file: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
