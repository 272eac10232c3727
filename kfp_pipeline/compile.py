"""Compiles the pipeline, with the drop-downs that the SDK cannot write.

The committed file is what people upload; a test compiles again and fails when they differ.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml
from kfp import compiler

from draft_model.parameters import PARAMETERS
from kfp_pipeline.pipeline import pipeline_draft_model

COMPILED = Path(__file__).parent / "compiled" / "pipeline_draft_model.yaml"


def compile_pipeline() -> str:
    """The pipeline's IR as YAML, the same for the same sources."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline_draft_model, str(path))
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    for parameter in PARAMETERS:
        if parameter.choices:
            inputs[parameter.name]["literals"] = list(parameter.choices)
    return yaml.safe_dump(spec, sort_keys=True, width=110, allow_unicode=True)


def write_compiled(path: Path = COMPILED) -> Path:
    """Writes the compiled pipeline.

    Args:
        path: of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(compile_pipeline(), encoding="utf-8")
    return path
