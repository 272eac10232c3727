"""Which installed distributions a module of the project imports, found in the sources."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OWN = ("draft_model", "kfp_pipeline")


def imported(module: str, function: str = "") -> dict[str, str]:
    """Walks imports, those inside functions included.

    Args:
        module: of the project.
        function: the only one of the module's functions that is called; all where it is empty.

    Returns:
        The module that imports it, by distribution.
    """
    found, seen = {}, set()
    todo = [(name, module) for name in _imports(module, function)]
    while todo:
        name, importer = todo.pop()
        if not name.startswith(OWN):
            found |= {owner: importer for owner in [_owner(name)] if owner}
        elif name not in seen and _source(name):
            seen.add(name)
            todo += [(each, name) for each in [name.rpartition(".")[0], *_imports(name)] if each]
    return found


def _source(module: str) -> Path | None:
    stem = ROOT / ("src" if module.startswith("draft_model") else "") / module.replace(".", "/")
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.exists()), None)


@cache
def _imports(module: str, function: str = "") -> list[str]:
    source = _source(module)
    tree = ast.parse(source.read_text(encoding="utf-8"))
    if function:
        tree.body = [n for n in tree.body if not isinstance(n, ast.FunctionDef) or n.name == function]
    return list(_statements(tree, module if source.stem == "__init__" else module.rpartition(".")[0]))


def _statements(node: ast.AST, package: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            name = f"{package}.{child.module}" if child.level else child.module
            yield from (name, *(f"{name}.{alias.name}" for alias in child.names))
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _statements(child, package)


@cache
def _owners() -> dict[str, str]:
    """Distributions by the modules that they have, also where several share a package, as kfp and kfp-kubernetes do."""
    return {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): canonicalize_name(distribution.name)
        for distribution in distributions()
        for path in (line.partition(",")[0] for line in (distribution.read_text("RECORD") or "").splitlines())
        if path.endswith(".py")
    }


def _owner(name: str) -> str:
    """The distribution of a module or of a name in one; empty for the standard library."""
    if name.partition(".")[0] in sys.stdlib_module_names:
        return ""
    parts = name.split(".")
    known = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((_owners()[module] for module in known if module in _owners()), parts[0])
