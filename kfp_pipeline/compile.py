"""Compiles the pipeline, with the drop-downs that the SDK cannot write.

Two files come out, and both are committed: the IR that people upload, and the same as Kubernetes resources for GitOps.
A test compiles again and fails when they differ. A PipelineVersion cannot be changed, so its name carries the hash of
what it holds.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from draft_model.parameters import PARAMETERS
from kfp_pipeline.pipeline import NAME, pipeline_draft_model

COMPILED = Path(__file__).parent / "compiled" / "pipeline_draft_model.yaml"
MANIFEST = Path(__file__).parents[1] / "manifests" / "pipelines" / "pipeline_draft_model.yaml"


def _compiled(**options: Any) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline_draft_model, str(path), **options)
        return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def _with_choices(spec: dict[str, Any]) -> dict[str, Any]:
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    for parameter in PARAMETERS:
        if parameter.choices:
            inputs[parameter.name]["literals"] = list(parameter.choices)
    return spec


def compile_pipeline() -> str:
    """The pipeline's IR as YAML, the same for the same sources."""
    spec, *platforms = _compiled()
    return "---\n".join(map(_text, [_with_choices(spec), *platforms]))


def compile_manifests() -> str:
    """The pipeline and its version as Kubernetes resources, for a server with --pipelinesStoreKubernetes=true."""
    options = KubernetesManifestOptions(pipeline_name=NAME, include_pipeline_manifest=True)
    documents = _compiled(kubernetes_manifest_format=True, kubernetes_manifest_options=options)
    version = next(document for document in documents if document["kind"] == "PipelineVersion")
    spec = _with_choices(version["spec"]["pipelineSpec"])
    held = [spec, version["spec"].get("platformSpec")]
    digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:12]
    version["metadata"]["name"] = version["spec"]["displayName"] = f"{NAME}-{digest}"
    return "---\n".join(_text(document) for document in documents)


def _text(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=True, width=110, allow_unicode=True)


def write_compiled(path: Path | None = None) -> list[Path]:
    """Writes the compiled pipeline.

    Args:
        path: where the IR alone goes; not given: both committed files.
    """
    texts = {path: compile_pipeline()} if path else {COMPILED: compile_pipeline(), MANIFEST: compile_manifests()}
    for file, text in texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return list(texts)
