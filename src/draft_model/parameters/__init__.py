"""The pipeline's parameters: the contract (schema) and what keeps a set of values from being run (rules)."""

from draft_model.parameters.schema import (
    CONTRACT_SIZE,
    PARAMETERS,
    REMOVED,
    STAGES,
    Parameter,
    Parameters,
    Stage,
    parameters_of,
)

__all__ = ["CONTRACT_SIZE", "PARAMETERS", "REMOVED", "STAGES", "Parameter", "Parameters", "Stage", "parameters_of"]
