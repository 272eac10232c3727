"""What evaluation.json holds, as records; docs/evaluation.schema.json is made from them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Acceptance(_Record):
    """What one way of decoding kept of its proposals."""

    acceptance_length: float = Field(ge=1, description="Tokens per forward pass of the target: 1 + accepted / rounds.")
    rounds: int = Field(description="Forward passes of the target that checked proposals.")
    drafted: int = Field(description="Rounds times the longest path that could be kept.")
    accepted: int = Field(description="Proposals that were kept.")
    tokens: int = Field(description="Tokens written.")
    acceptance_by_position: list[float] = Field(description="Cumulative: share of all rounds that kept the k-th.")
    conditional_acceptance_by_position: list[float | None] = Field(
        description="Share of the rounds that kept the one before; null where none did."
    )


class Way(Acceptance):
    """Another way of decoding."""

    name: str
    proposals: int = Field(description="Tokens proposed per round, over all branches.")


class Category(_Record):
    """Prompts of one category."""

    category: str
    prompts: int
    rounds: int
    acceptance_length: float | None


class Depth(_Record):
    """Rounds that began after so many tokens of the reply."""

    from_: int = Field(alias="from", description="Tokens, inclusive.")
    to: int | None = Field(description="Tokens, inclusive; null in the last bin.")
    rounds: int
    acceptance_length: float | None


class Costs(_Record):
    """Times of one forward pass, after a prompt."""

    context: int = Field(description="Tokens of the prompt.")
    target_seconds: float = Field(description="Of the target over one token; the unit of the others.")
    verify_cost: list[float] = Field(description="Of the target over K + 1 tokens, K = 1..10.")
    draft_cost: float = Field(description="Of the draft over one token.")
    hardware: str
    dtype: str


class Proposals(_Record):
    """What proposing K tokens comes to."""

    proposals: int
    acceptance_length: float = Field(description="From the measured conditional acceptance.")
    predicted_acceptance_length: float | None = Field(description="What the last validation simulated.")
    speed_up: float = Field(description="Over the target alone, one request at a time, on this hardware.")


class Prediction(_Record):
    """Speed-up for K = 1..10."""

    prompts: int
    costs: Costs
    by_proposals: list[Proposals]
    recommended: int = Field(description="K of the highest speed-up; 0 where none is above 1.")


class WallClock(_Record):
    """Time with the draft beside the target alone, in the same run."""

    target_alone_tokens_per_second: float
    tokens_per_second: float
    speed_up: float
    batch: int
    hardware: str
    dtype: str


class Place(_Record):
    """A place where two replies differ."""

    prompt: int
    position: int
    margin: float = Field(description="Of the target's two best logits there.")


class Lossless(_Record):
    """Greedy replies held against the target's own."""

    prompts: int
    compared_tokens: int
    identical: bool
    ties: list[Place]
    differences: list[Place]


class Sample(_Record):
    """One reply, token by token."""

    prompt: str
    reply: list[tuple[str, bool]] = Field(description="Text, and whether the draft proposed it.")


class Evaluation(_Record):
    """evaluation.json."""

    num_speculative_tokens: int
    prompts: int
    prompts_source: str
    max_new_tokens: int
    dtype: str
    hardware: str
    trained: Acceptance
    untrained: Acceptance
    by_category: list[Category]
    by_depth: list[Depth]
    more: list[Way]
    predicted_acceptance_length: float | None
    prediction: Prediction
    wall_clock: WallClock
    lossless: Lossless
    sample: Sample
    prompt_tokens: list[list[int]]
    seconds: float


def json_schema() -> dict[str, Any]:
    """The JSON schema of evaluation.json."""
    return Evaluation.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
