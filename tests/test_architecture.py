"""What may import what: the packages of draft_model, their table in docs/architecture.md, and what stays unimported."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/draft_model"
TABLE = re.compile(r"<!-- packages -->\n\|.*\n\|[-| ]+\n((?:\|.*\n)+)<!-- end of packages -->")


def _imports(node: ast.AST) -> Iterator[str]:
    """Names that a module imports when it runs; those for types alone do not count."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children: list[ast.stmt] | Iterator[ast.AST] = node.orelse
    else:
        children = ast.iter_child_nodes(node)
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        yield from (f"{node.module}.{name.name}" for name in node.names)
    for child in children:
        yield from _imports(child)


def _package(file: Path) -> str:
    """The folder or module directly below draft_model."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


IMPORTS = {file: set(_imports(ast.parse(file.read_text(encoding="utf-8")))) for file in SOURCE.rglob("*.py")}
GRAPH: dict[str, set[str]] = {_package(file): set() for file in IMPORTS}
for _file, _names in IMPORTS.items():
    GRAPH[_package(_file)] |= {name.split(".")[1] for name in _names if name.startswith("draft_model.")}
    GRAPH[_package(_file)].discard(_package(_file))


def test_no_import_cycle_between_packages():
    assert set(TopologicalSorter(GRAPH).static_order()) == set(GRAPH)  # a cycle raises CycleError, which names it


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("kfp", set()),
        ("kfp_pipeline", {"cli"}),
        ("kubernetes", {"jobs"}),
        ("mlflow", {"model_import", "tracking"}),
    ],
)
def test_libraries_are_imported_where_they_belong(library, allowed):
    users = {_package(file) for file, names in IMPORTS.items() if library in {name.split(".")[0] for name in names}}
    assert users == allowed


def test_the_table_in_the_docs_is_the_graph():
    found = TABLE.search((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    assert found, "docs/architecture.md has no table of packages"
    rows = [[re.findall(r"`(\w+)`", cell) for cell in line.strip("|\n").split("|")] for line in found[1].splitlines()]
    assert {name: set(imports) for (name,), _, imports in rows} == GRAPH
    above: set[str] = set()
    for (name,), _, imports in rows:
        assert set(imports) <= above, f"{name} stands above what it imports"
        above.add(name)


def test_only_a_family_names_its_own_modules():
    """What is outside asks `drafts.family`; so another family is one folder and one line in a table."""
    families = {folder.name for folder in (SOURCE / "drafts").iterdir() if (folder / "config.py").exists()}
    assert len(families) > 1
    named = re.compile(rf"drafts[./]({'|'.join(families)})\b|Eagle3\w+|BlockDraft|BlockConfig")
    assert [
        f"{file.relative_to(SOURCE)}: {found[0]}"
        for file in IMPORTS
        if file != SOURCE / "drafts/__init__.py"
        for found in named.finditer(file.read_text(encoding="utf-8"))
        if file.relative_to(SOURCE).parts[:2] != ("drafts", found[1]) and (found[1] or file.parent.name not in families)
    ] == []


def test_the_shape_of_a_draft_is_known_without_torch():
    """The image of preflight and data set has none."""
    program = (
        "import json, sys; sys.modules['torch'] = None\n"
        "from draft_model import drafts, preflight\nfrom draft_model.dataset import build\n"
        "from draft_model.parameters import Parameters\nfrom draft_model.training.plan import draft_of\n"
        "config = json.load(open('docs/targets/llama-3.3-70b.json'))\n"
        "for name in drafts.FAMILIES: draft_of(config, Parameters(draft_architecture=name))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


IMPORTED = """
import sys
before = set(sys.modules)
exec(sys.argv.pop(1))
files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items() if name not in before}
print(*{name.partition(".")[0] for name, file in files.items() if "site-packages" in file}, file=sys.stderr)
"""
LIGHT = {"click", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "pandas", "mlflow", "matplotlib", "boto3", "huggingface_hub"}
COMMAND = "from draft_model.cli import cli; cli(sys.argv[1:], standalone_mode=False)"


def imported(program, *arguments):
    """The installed packages that a program imports."""
    command = [sys.executable, "-c", IMPORTED, program, *map(str, arguments)]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["submit", "--help"], ["train", "--help"], ["parameters"]])
def test_help_imports_nothing_that_takes_time(arguments):
    assert imported(COMMAND, *arguments) <= LIGHT


def test_what_only_checks_or_compiles_imports_no_library_that_trains(tmp_path):
    assert not imported("import draft_model.preflight") & (HEAVY | {"kfp"})
    packages = imported(COMMAND, "compile", "--output", tmp_path / "pipeline.yaml")
    assert "kfp" in packages
    assert not packages & HEAVY
