"""The README of each component's folder, from the docstring of its module and its metadata.yaml.

The sections are those that kubeflow/pipelines-components asks for. `draft-model compile` writes the files, and a test
fails when one is out of date.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import docstring_parser
import yaml

from draft_model.markdown import table

FOLDER = Path(__file__).parent / "components"


def readmes(components: Iterable[Any]) -> dict[Path, str]:
    """The README of each component, by the file that it belongs in."""
    return {FOLDER / each.python_func.__name__ / "README.md": _readme(each) for each in components}


def _readme(component: Any) -> str:
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
