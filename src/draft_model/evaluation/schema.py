"""What evaluation.json and report.json hold, as records; docs/*.schema.json are made from them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Open(BaseModel):
    """Part of a record that another stage writes, and may write more into."""

    model_config = ConfigDict(extra="allow")


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


class TrainedTarget(_Open):
    """The model that the draft is for."""

    source: str
    architecture: str
    parameters: int
    hidden_size: int
    layers: int


class Logged(_Open):
    """What some optimizer steps, or one validation, came to; lists are by draft position."""

    step: int
    loss: list[float | None] = Field(description="Nats per token.")
    agreement: list[float | None] = Field(description="Share where the draft's best token is the target's.")
    alpha: list[float | None] = Field(description="Mean of sum(min(p, q)).")
    conditional_acceptance: list[float | None]
    acceptance_length: float | None = Field(description="Simulated from the conditional acceptance.")


class Training(_Open):
    """training.json, without the data set's report."""

    parameters: dict[str, Any]
    draft: dict[str, Any] = Field(description="The draft's config.json.")
    draft_parameters: int
    target: TrainedTarget
    steps: int
    epochs: float
    world_size: int
    tokens: int
    seconds: float
    tokens_per_second: float
    log: list[Logged]
    validation: list[Logged]
    versions: dict[str, str]
    hardware: str


class DataSplit(_Open):
    """Counts of one split."""

    rows_in: int
    rows_kept: int
    rows_rejected: int
    rows_truncated: int
    tokens: int
    supervised_tokens: int
    distinct_supervised_tokens: int
    coverage: float = Field(description="Share of the supervised tokens that is in the draft vocabulary.")
    length_quantiles: dict[str, int]
    length_histogram: list[dict[str, int]]
    rejected_reasons: dict[str, int]


class DatasetReport(_Open):
    """The data set's report.json."""

    vocab_size: int
    draft_vocab_size: int
    chat_template: str
    max_length: int
    fingerprint: str
    splits: dict[str, DataSplit]
    coverage_by_size: list[dict[str, float | None]]
    samples: list[list[tuple[str, bool]]] = Field(description="Text, and whether it is supervised.")


class Hash(_Record):
    """What went in or came out."""

    of: str = Field(description="target (all its files), dataset (all that shapes it) or draft (its weights).")
    uri: str
    sha256: str = Field(description="Empty where it was not recorded.")


class Warned(_Record):
    """Something that the reader should check."""

    title: str
    advice: str


class Report(_Record):
    """report.json: the data of report.html."""

    training: Training
    dataset: DatasetReport
    evaluation: Evaluation | None = Field(description="Null where there was nothing to decode.")
    hashes: list[Hash]
    findings: list[Warned]


SCHEMAS: dict[str, type[BaseModel]] = {"evaluation.schema.json": Evaluation, "report.schema.json": Report}
"""By the name of their file in docs/."""


def json_schema(record: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a record."""
    return record.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
