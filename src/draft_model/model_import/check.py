"""Whether a model can be a target: decided by its structure, before anything large is copied.

What is checked is a skeleton: configuration, tokenizer, and the weights' headers with holes where the tensors are.
transformers opens it on the meta device, so a model of any size takes little memory and no disk.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft_model.drafts.eagle3.config import draft_config_for
from draft_model.errors import DraftModelError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MOST_NAMED = 5


@dataclass(frozen=True)
class ModelFacts:
    """What a check found.

    Attributes:
        architecture: transformers' class.
        parameters: number of weights; those that are used twice count once.
    """

    architecture: str
    parameters: int


def check_model(folder: Path, name: str, problems: list[str], weights: bool) -> ModelFacts:
    """Checks configuration, structure, tokenizer and, where they are there, that no weight is missing.

    Args:
        folder: the skeleton.
        name: what errors call the model.
        problems: what is known to be wrong with it.
        weights: whether the weights' headers are in the folder.

    Raises:
        DraftModelError: with everything that keeps it from being used.
    """
    problems = list(problems)
    config: dict[str, Any] = {}
    wrong = len(problems)
    try:
        config = _json_object(folder / "config.json")
        draft_config_for(config)
    except (OSError, ValueError) as error:
        problems.append(f"its config.json cannot be read: {error}")
    except DraftModelError as error:
        problems += error.problems
    model = None
    with _quiet_transformers():
        if len(problems) == wrong:
            model = _open(folder, config, problems)
        if model is not None:
            problems += _structure_problems(model)
            if weights and len(problems) == wrong == 0:
                problems += _weight_problems(folder, model)
        problems += _tokenizer_problems(folder, loads=model is not None)
    if problems or model is None:
        raise DraftModelError([f"target model {name}: {problem}" for problem in problems])
    return ModelFacts(type(model).__name__, model.num_parameters())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its warnings and bars speak of what is told here in words."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    before, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(before)
        if bars:
            transformers_logging.enable_progress_bar()


def _json_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _open(folder: Path, config: dict[str, Any], problems: list[str]) -> Any:
    """The model on the meta device, without weights; None where transformers has none like it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except Exception as error:  # a configuration may make transformers raise anything
        if "auto_map" in config:
            problems.append("it needs code from its repository (trust_remote_code), which is never run here")
        else:
            problems.append(
                f"model_type {config.get('model_type')!r} is no decoder for text generation that transformers loads: "
                f"{_first_line(error)}"
            )
        return None


def _structure_problems(model: Any) -> list[str]:
    name = type(model).__name__
    start = f"{name} ({model.config.model_type}) is no decoder-only model of Llama's structure: "
    if getattr(model.config, "is_encoder_decoder", False):
        return [f"{start}it has an encoder"]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
    if not layers or getattr(norm, "weight", None) is None:
        return [f"{start}it has not both decoder layers and a final norm"]
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None or model.get_input_embeddings() is None:
        return [f"{start}it has no input embedding or no output head"]
    return _head_problems(model, start)


def _head_problems(model: Any, start: str) -> list[str]:
    """Whether the logits are what the training takes them for: asked of the model's own forward pass.

    Its decoder is replaced by one that answers with known states, its head by a small one.
    """
    import torch
    from transformers.modeling_outputs import MoeModelOutputWithPast

    from draft_model.target.model import head_logits

    decoder, old = model.get_decoder(), model.get_output_embeddings()
    text = model.config.get_text_config()
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
            expected = head_logits(states, head.weight, head.bias, text)
        if not torch.allclose(logits.float(), expected, rtol=1e-3, atol=1e-3):
            return [f"{start}its logits are no plain function of its head that the training knows"]
    except Exception as error:  # a forward pass may raise anything
        return [f"{start}its head cannot be taken apart from its decoder ({_first_line(error)})"]
    finally:
        decoder.forward = forward
        model.set_output_embeddings(old)
    return []


def _weight_problems(folder: Path, model: Any) -> list[str]:
    """Has transformers load the skeleton: a tensor that no file holds would be drawn at random without a word."""
    from transformers import AutoModelForCausalLM

    try:
        _, info = AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises anything
        return _compared(folder, model) or [f"transformers cannot load its weights: {_first_line(error)}"]
    missing = sorted(info["missing_keys"])
    return _named(missing, "its weights lack {}; save the whole model again") if missing else []


def _compared(folder: Path, model: Any) -> list[str]:
    """What differs between the tensors that the configuration asks for and those of the files' headers."""
    from safetensors import safe_open
    from transformers.core_model_loading import revert_weight_conversion

    expected = {
        name: list(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()
    }
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            found |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  (not a dict)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(expected.keys() - found.keys() - tied)
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    said = [f"{name} {found[name]}, where config.json asks for {expected[name]}" for name in other]
    return [
        *(_named(missing, "its weights lack {}; save the whole model again") if missing else []),
        *(_named(said, "its weights have another shape than its config.json says: {}") if said else []),
    ]


def _named(names: list[str], sentence: str) -> list[str]:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return [sentence.format(", ".join(names[:_MOST_NAMED]) + more)]


def _tokenizer_problems(folder: Path, loads: bool) -> list[str]:
    if not any((folder / file).exists() for file in _TOKENIZERS):
        return ["it has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)"]
    if not loads:  # transformers looks into config.json for the tokenizer too
        return []
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer("a").input_ids:
            return []
        reason = "it makes no tokens of text"
    except Exception as error:  # a broken file makes tokenizers raise anything
        reason = _first_line(error)
    if "trust_remote_code" in reason:
        return ["its tokenizer needs code from its repository (trust_remote_code), which is never run here"]
    return [f"its tokenizer cannot be loaded ({reason}); save it again with save_pretrained"]
