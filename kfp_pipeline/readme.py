"""The README of each component's folder, from its docstring and its metadata.yaml.

The sections are those that kubeflow/pipelines-components asks for, so that a folder can be contributed as a copy.
`draft-model compile` writes the files, and a test fails when one is out of date.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import docstring_parser
import yaml

FOLDER = Path(__file__).parent / "components"


def readmes(components: Iterable[Any]) -> dict[Path, str]:
    """The README of each component, by the file that it belongs in.

    Args:
        components: of the pipeline; each lies in a folder of its own name.
    """
    named = {component.python_func.__name__: component for component in components}
    return {FOLDER / name / "README.md": _readme(name, component) for name, component in named.items()}


def _readme(name: str, component: Any) -> str:
    docstring = docstring_parser.parse(component.python_func.__doc__, docstring_parser.DocstringStyle.GOOGLE)
    described = {each.arg_name: _line(each.description) for each in docstring.params}
    returns = _line(docstring.returns.description if docstring.returns else None)
    inputs = [
        (f"`{key}`", each.type, _default(each), described[key]) for key, each in component.component_spec.inputs.items()
    ]
    outputs = [
        (f"`{key}`", each.type.partition("@")[0], described.get(key, returns))
        for key, each in (component.component_spec.outputs or {}).items()
    ]
    paragraphs = [docstring.short_description, *(docstring.long_description or "").split("\n\n")]
    overview = "\n\n".join(_line(paragraph) for paragraph in paragraphs if paragraph)
    title = name.replace("_", " ").capitalize()
    example = (
        f"```python\nfrom kfp_pipeline.components.{name} import {name}\n```\n\n"
        "`component.py` names the kind of image that has the library, and `kfp_pipeline/components/images.py` the "
        "image of each kind: in a copy of this folder, one line to change."
    )
    sections = {
        "Overview": overview,
        "Inputs": _table(inputs, ("name", "type", "default", "description")),
        "Outputs": _table(outputs, ("name", "type", "description")),
        "Usage": example,
        "Metadata": _metadata(FOLDER / name / "metadata.yaml"),
    }
    return f"# {title}\n\n" + "\n\n".join(f"## {head}\n\n{text.strip()}" for head, text in sections.items()) + "\n"


def _table(rows: Sequence[tuple[str, ...]], heads: tuple[str, ...]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _default(each: Any) -> str:
    if not each.optional:
        return "required"
    return "empty" if each.default == "" else "given by KFP" if each.default is None else f"`{each.default}`"


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _metadata(path: Path) -> str:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    needs = [f"{each['name']} {each['version']}" for kind in found["dependencies"].values() for each in kind]
    lines = [
        f"- Stability: {found['stability']}",
        f"- Needs: {', '.join(needs)}",
        f"- Tags: {', '.join(found['tags'])}",
        f"- Last verified: {found['lastVerified']:%Y-%m-%d}",
    ]
    return "\n".join(lines)
