"""What the loop, checkpoints, evaluation, export and plan need of a family of drafts.

A family is a folder below `drafts/` with a `Family`, and a line in `drafts.FAMILIES`; docs/architecture.md says how to
add one. Nothing outside `drafts/` names a family's modules. A `Family` and its `Shape` are had without torch, which the
image of preflight and data set does not hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from draft_model.errors import DraftModelError, Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from draft_model.drafts.batch import Batch
    from draft_model.drafts.counts import Counts
    from draft_model.target.model import Target

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Shape(ABC):
    """A draft's configuration; a family adds its own fields."""

    hidden_size: int  # H, the target's
    vocab_size: int  # V, the target's
    draft_vocab_size: int  # D, at most V
    max_position_embeddings: int  # the target's real one; engines clamp positions beyond it
    aux_layers: tuple[int, ...]  # the n features are the residual stream after so many target layers, low to high

    @property
    @abstractmethod
    def family(self) -> str:
        """Name of the family in `drafts.FAMILIES`."""

    @property
    def state_width(self) -> int:
        """Numbers per token of the target's states: n features and the final hidden state, (n + 1) H."""
        return (len(self.aux_layers) + 1) * self.hidden_size

    @property
    def proposals(self) -> int:
        """K, tokens of a block that is proposed at once; 0: one after the other, as many as are wanted."""
        return 0

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """config.json as the engines read it."""


class Draft(Protocol):
    """A draft's float32 parameters under the names of the checkpoint, and its vocabulary; an `nn.Module`."""

    config: Any
    parameters: Callable[[], Iterator[nn.Parameter]]
    named_parameters: Callable[[], Iterator[tuple[str, nn.Parameter]]]
    to: Callable[[torch.device], Any]
    initialise: Callable[[int, Any], None]  # (seed, Target): fresh weights, from what the target knows already


class Objective(Protocol):
    """The loss of a draft against its target."""

    dtype: torch.dtype

    def __call__(self, batch: Batch, states: list[Tensor]) -> tuple[Tensor, Counts]:
        """The loss summed over supervised positions, whose backward adds to the parameters' `.grad`.

        What is drawn at random comes from `batch.keys` alone.

        Args:
            batch: B conversations, on the host.
            states: what `Target.states` gave for each of them, [T_b, Shape.state_width].

        Returns:
            A float32 scalar and the `Counts`, both on the device.
        """

    def no_counts(self) -> Counts:
        """The `Counts` of no conversation, on the device."""


class Proposer(Protocol):
    """Greedy proposals for the rows of a batch; it keeps what it has read of the columns so far."""

    def propose(
        self, features: Tensor, tokens: Tensor, positions: Tensor, visible: Tensor, ends: Tensor, count: int
    ) -> Tensor:
        """Reads new columns of the context, then proposes what follows each row's last one.

        Args:
            features: the target's, of Q new columns, [B, Q, nH].
            tokens: the token after each column, int64 [B, Q]; the one after a row's last column is the newest, which
                the target has not read.
            positions: of the columns, int64 [B, Q].
            visible: columns that a row may see, the new ones included, bool [B, C + Q].
            ends: each row's last accepted new column, int64 [B].
            count: K, how many tokens to propose.

        Returns:
            Token ids of the target, int64 [B, K].
        """

    def select(self, rows: Tensor) -> None:
        """Keeps some rows of the batch, int64 [B']."""


@dataclass(frozen=True)
class Costs:
    """What a draft costs, for the arithmetic of `draft-model plan`."""

    parameters: int  # that are trained
    token_numbers: float  # that autograd keeps for each token
    # that are kept for each supervised position of a micro-batch, by the bytes that one number of each takes, and by
    # those of the GPU: what would take too much of them is computed again
    row_numbers: Callable[[float, float], float]
    token_flops: float  # of each token, forward and backward
    # of each supervised position, forward and backward, by the conversation's tokens
    row_flops: Callable[[float], float]
    chunk_bytes: Callable[[int], float]  # of the head at work, by the bytes of the compute type


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of drafts."""

    name: str  # value of draft_architecture
    title: str  # in texts
    vllm_method: str  # `method` of vLLM's speculative configuration
    sglang_algorithm: str  # SGLang's --speculative-algorithm
    sglang_options: Callable[[int], dict[str, int]]  # (proposals) -> SGLang's further options
    unused: tuple[str, ...] = ()  # parameters without effect for it
    default_loss: str = "kl"  # what draft_loss `default` means for it
    # (config.json) -> whether it is of a draft of this family, ours or another trainer's
    owns: Callable[[Mapping[str, Any]], bool]
    # (target's config.json, K if it is known) -> Shape of its default draft, a block of K where the family proposes
    # blocks; refuses a target that cannot have one
    default_shape: Callable[..., Any]
    # (default Shape, draft_model_config or a checkpoint's config.json, what errors name) -> Shape
    adapt: Callable[..., Any]
    create: Callable[[Any, Tensor, Tensor], Any]  # (Shape, t2d bool [V], d2t int64 [D]) -> Draft
    # (Draft, Target, ttt_length, attention_backend, dtype, longest conversation, draft_loss) -> Objective
    objective: Callable[..., Objective]
    proposer: Callable[[Any, Target, int], Proposer]  # (Draft, Target, positions that decoding may reach) -> Proposer
    costs: Callable[[Any, int], Costs]  # (Shape, ttt_length) -> Costs
    # (config.json, tensors, URI for errors) -> both as `files.save_draft` writes them, of a draft of any trainer;
    # refuses one that computes something else, or has tensors that this draft does not have
    read: Callable[[Mapping[str, Any], Mapping[str, Tensor], str], tuple[dict[str, Any], dict[str, Tensor]]]
    # (config.json and tensors of `read`, vllm, sglang or speculators, and for the last one the target's `name` and
    # `architectures` and how many `proposals` serve best) -> both as that tool writes them
    export: Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]


def check_proposals(shape: Shape, wanted: int) -> str:
    """A note where a draft is to propose fewer tokens than the block that it is trained for; empty where it is not.

    `wanted` is num_speculative_tokens; more than the block has raises DraftModelError.
    """
    if wanted > shape.proposals > 0:
        most = f"a block of this draft has {shape.proposals} proposals: use at most {shape.proposals}, or train one"
        problem = f"given {wanted}, but {most} with a larger block_size in draft_model_config"
        raise DraftModelError([Problem("num_speculative_tokens", problem)])
    if wanted >= shape.proposals:
        return ""
    return (
        f"num_speculative_tokens: given {wanted}, but the draft is trained for blocks of {shape.proposals}: it accepts "
        f"less in other blocks, and SGLang serves DSpark in no others; use num_speculative_tokens={shape.proposals}"
    )


def later(where: str) -> Callable[..., Any]:
    """A function or class, `module:name` of `drafts`, whose module is imported, with torch, when it is called."""
    module, _, name = where.partition(":")

    def call(*args: Any, **options: Any) -> Any:
        return getattr(import_module(f"draft_model.drafts.{module}"), name)(*args, **options)

    return call


def load_weights(draft: Draft, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies a checkpoint's weights, by checkpoint name, into a draft of the same shape.

    Raises:
        DraftModelError: when a tensor is missing or of another shape; names the source.
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
