"""What the loop, checkpoints, evaluation, export and plan need of a family of drafts.

A family is a folder below `drafts/` with a `Family`, and a line in `drafts.FAMILIES`. docs/architecture.md says how to
add one, and which modules outside still name EAGLE-3's classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from draft_model.errors import DraftModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Shape(ABC):
    """A draft's configuration; a family adds its own fields.

    Attributes:
        hidden_size: H, the target's.
        vocab_size: V, the target's.
        draft_vocab_size: D, at most V.
        max_position_embeddings: the target's real one; engines clamp positions beyond it.
        aux_layers: the n features are the residual stream after so many target layers, low to high.
    """

    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    max_position_embeddings: int
    aux_layers: tuple[int, ...]

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """config.json as the engines read it."""


class Draft(Protocol):
    """A draft's float32 parameters under the names of the checkpoint, and its vocabulary; an `nn.Module`."""

    config: Any

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All that is trained, by name."""

    def to(self, device: torch.device) -> Any:
        """The draft on a device."""

    def initialise(self, seed: int, target: Any) -> None:
        """Fresh weights, from what the target knows already."""


@dataclass(frozen=True)
class Costs:
    """What a draft costs, for the arithmetic of `draft-model plan`.

    Attributes:
        parameters: that are trained.
        token_numbers: that autograd keeps for each token.
        row_numbers: that are kept for each supervised position of a micro-batch, by the bytes that one number of each
            takes, and by those of the GPU: what would take too much of them is computed again.
        token_flops: of each token, forward and backward.
        row_flops: of each supervised position, forward and backward, by the conversation's tokens.
        chunk_bytes: of the head at work, by the bytes of the compute type.
    """

    parameters: int
    token_numbers: float
    row_numbers: Callable[[float, float], float]
    token_flops: float
    row_flops: Callable[[float], float]
    chunk_bytes: Callable[[int], float]


@dataclass(frozen=True)
class Family:
    """One family of drafts.

    Attributes:
        default_shape: (target's config.json) -> Shape of its default draft; refuses a target that cannot have one.
        adapt: (default Shape, draft_model_config or a checkpoint's config.json, what errors name) -> Shape.
        create: (Shape, t2d bool [V], d2t int64 [D]) -> Draft.
        objective: (Draft, Target, steps, attention_backend, dtype, longest conversation) -> (Batch, list of the
            target's states [T_b, nH + H]) -> (loss, counts): a float32 sum, and the counts that metrics are made of.
        costs: (Shape, steps) -> Costs.
        save: (folder, Draft): config.json and model.safetensors as the engines load them.
        load: (folder) -> Draft, of what `save` wrote.
        read: (config.json, tensors, URI for errors) -> both as `save` writes them, of a draft of any trainer.
        vocabulary: (tensors, Shape) -> t2d, d2t of a checkpoint.
    """

    default_shape: Callable[[Mapping[str, Any]], Shape]
    adapt: Callable[..., Shape]
    create: Callable[[Any, Tensor, Tensor], Draft]
    objective: Callable[..., Callable[[Any, list[Tensor]], tuple[Tensor, Any]]]
    costs: Callable[[Any, int], Costs]
    save: Callable[[Path, Any], None]
    load: Callable[[Path], Draft]
    read: Callable[[Mapping[str, Any], Mapping[str, Tensor], str], tuple[dict[str, Any], dict[str, Tensor]]]
    vocabulary: Callable[[Mapping[str, Tensor], Any], tuple[Tensor, Tensor]]


def load_weights(draft: Draft, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies a checkpoint's weights into a draft of the same shape.

    Args:
        draft: the draft.
        tensors: by checkpoint name.
        source: what an error names.

    Raises:
        DraftModelError: when a tensor is missing or of another shape.
    """
    import torch

    own = dict(draft.named_parameters())
    problems = [f"{name} is missing" for name in sorted(own.keys() - tensors.keys())]
    problems += [
        f"{name}: {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        raise DraftModelError(f"the checkpoint {source} does not fit this draft: {'; '.join(problems)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
