"""EAGLE-3 (arXiv 2503.01840): the draft model, its training objective and the format that engines serve."""
