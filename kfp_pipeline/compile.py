"""Compiles the pipeline, with the drop-downs that the SDK cannot write.

Two files come out, and both are committed: the IR that people upload, and the same as Kubernetes resources for GitOps;
with them the README of each component. A test compiles again and fails when one differs. A PipelineVersion cannot be
changed, so its name carries the hash of what it holds.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from kfp import compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from draft_model.markdown import table
from draft_model.parameters import PARAMETERS
from kfp_pipeline.pipeline import COMPONENTS, NAME, pipeline_draft_model

FOLDER = Path(__file__).parent / "components"
COMPILED = Path(__file__).parent / "compiled" / "pipeline_draft_model.yaml"
MANIFEST = Path(__file__).parents[1] / "manifests" / "pipelines" / "pipeline_draft_model.yaml"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where PyYAML was built with libyaml


def _compiled(**options: Any) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline_draft_model, str(path), **options)
        return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=LOADER))


def _with_choices(spec: dict[str, Any]) -> dict[str, Any]:
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    for parameter in PARAMETERS:
        if parameter.choices:
            inputs[parameter.name]["literals"] = list(parameter.choices)
    return spec


def compile_documents() -> list[dict[str, Any]]:
    """The pipeline's IR: its specification, and what it asks of Kubernetes."""
    spec, *platforms = _compiled()
    return [_with_choices(spec), *platforms]


def as_text(documents: list[dict[str, Any]]) -> str:
    """Documents as YAML, the same for the same content."""
    texts = (yaml.safe_dump(each, sort_keys=True, width=110, allow_unicode=True) for each in documents)
    return "---\n".join(texts)


def version_name(documents: list[dict[str, Any]]) -> str:
    """Name of the pipeline's version that holds these documents: the same for the same content."""
    spec, platform = (*documents, None)[:2]
    digest = hashlib.sha256(json.dumps([spec, platform], sort_keys=True).encode()).hexdigest()[:12]
    return f"{NAME}-{digest}"


def compile_pipeline() -> str:
    """The pipeline's IR as YAML, the same for the same sources."""
    return as_text(compile_documents())


def compile_manifests() -> str:
    """The pipeline and its version as Kubernetes resources, for a server with --pipelinesStoreKubernetes=true."""
    options = KubernetesManifestOptions(pipeline_name=NAME, include_pipeline_manifest=True)
    documents = _compiled(kubernetes_manifest_format=True, kubernetes_manifest_options=options)
    version = next(document for document in documents if document["kind"] == "PipelineVersion")
    held = [_with_choices(version["spec"]["pipelineSpec"]), version["spec"].get("platformSpec")]
    version["metadata"]["name"] = version["spec"]["displayName"] = version_name(held)
    return as_text(documents)


def committed() -> dict[Path, str]:
    """All that is written from the sources and committed beside them."""
    readmes = {FOLDER / each.python_func.__name__ / "README.md": _readme(each) for each in COMPONENTS}
    return {COMPILED: compile_pipeline(), MANIFEST: compile_manifests(), **readmes}


def _readme(component: Any) -> str:
    """The README of a component's folder, from the docstring of its module and its metadata.yaml.

    The sections are those that kubeflow/pipelines-components asks for.
    """
    name = component.python_func.__name__
    text, _, returns = (inspect.getdoc(sys.modules[component.python_func.__module__]) or "").partition("\nReturns:\n")
    docstring = docstring_parser.parse(f"{text}\n{returns}", docstring_parser.DocstringStyle.GOOGLE)
    described = {each.arg_name: " ".join((each.description or "").split()) for each in docstring.params}
    spec, metadata = component.component_spec, yaml.safe_load((FOLDER / name / "metadata.yaml").read_text())
    inputs = [(f"`{key}`", each.type, described[key]) for key, each in spec.inputs.items() if key in described]
    if len(inputs) < len(spec.inputs):
        inputs.append(("each of the pipeline's parameters", "", "`draft-model parameters` lists them"))
    outputs = [(f"`{key}`", each.type.partition("@")[0], described[key]) for key, each in (spec.outputs or {}).items()]
    needs = [f"{each['name']} {each['version']}" for kind in metadata["dependencies"].values() for each in kind]
    facts = {"Stability": metadata["stability"], "Needs": ", ".join(needs), "Tags": ", ".join(metadata["tags"]),
             "Last verified": f"{metadata['lastVerified']:%Y-%m-%d}"}  # fmt: skip
    heads = ("name", "type", "description")
    sections = {
        "Overview": text.partition("\n\nArgs:")[0],
        "Inputs": table(inputs, heads, raw=True),
        "Outputs": table(outputs, heads, raw=True),
        "Usage": f"```python\nfrom kfp_pipeline.components.{name} import {name}\n```",
        "Metadata": "\n".join(f"- {key}: {value}" for key, value in facts.items()),
    }
    title = name.replace("_", " ").capitalize()
    return f"# {title}\n\n" + "\n\n".join(f"## {head}\n\n{part.strip()}" for head, part in sections.items()) + "\n"


def write_compiled(output: Path | None = None, manifest: Path | None = None) -> list[Path]:
    """Writes the IR and the Kubernetes resources to the files given; without any, all committed files."""
    texts = {output: compile_pipeline()} if output else {}
    texts |= {manifest: compile_manifests()} if manifest else {}
    texts = texts or committed()
    for file, text in texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return list(texts)
