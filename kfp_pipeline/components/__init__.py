"""One folder per step: a thin call into `draft_model.steps`, which the step's image has.

The source of a component's function, the descriptions in its docstring and the patch of its pod are kept several times
in each run's Workflow, and KFP stops reading a Workflow that gets long. So the functions have no docstring: each
module's has their inputs and outputs, and the README of the folder is made from it.
"""
