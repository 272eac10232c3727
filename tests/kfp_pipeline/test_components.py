"""Each component is a folder that can be contributed as a copy: what kubeflow/pipelines-components asks of one."""

import ast
import re
import shutil
import subprocess
import sys
from datetime import datetime

import pytest
import yaml

from kfp_pipeline.compile import COMPONENTS, FOLDER

NAMES = [component.python_func.__name__ for component in COMPONENTS]
IMAGES_LINE = "from kfp_pipeline.components.images import IMAGES\n"


def test_every_folder_is_a_step_of_the_pipeline():
    assert {path.parent.name for path in FOLDER.glob("*/component.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_has_what_is_asked_for(name):
    folder = FOLDER / name
    for file in ("__init__.py", "component.py", "metadata.yaml", "README.md"):
        assert (folder / file).is_file(), file
    readme = (folder / "README.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*)$", readme, re.MULTILINE)
    assert sections == ["Overview", "Inputs", "Outputs", "Usage", "Metadata"]
    rows = re.findall(r"^\| `.*", readme, re.MULTILINE)
    assert [row for row in rows if not row.rstrip(" |").rpartition("| ")[2]] == [], "not described"


@pytest.mark.parametrize("name", NAMES)
def test_the_metadata_is_of_the_published_schema(name):
    found = yaml.safe_load((FOLDER / name / "metadata.yaml").read_text(encoding="utf-8"))
    assert found.keys() == {"name", "stability", "dependencies", "tags", "lastVerified"}
    assert found["name"] == name
    assert found["stability"] in ("alpha", "beta", "stable")
    assert isinstance(found["lastVerified"], datetime)
    needs = found["dependencies"]["kubeflow"]
    assert "Pipelines" in {each["name"] for each in needs}
    assert all(re.fullmatch(r"(==|>=|<=|~=)?\d+\.\d+\.\d+", each["version"]) for each in needs)


@pytest.mark.parametrize("name", NAMES)
def test_the_code_is_thin_and_imports_kfp_alone_above_its_function(name):
    tree = ast.parse((FOLDER / name / "component.py").read_text(encoding="utf-8"))
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert modules <= {"typing", "kfp", "kfp.dsl", "kfp_pipeline.components.images"}
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert ast.get_docstring(function) is None, "it would be kept in every run's Workflow"
    assert len(function.body) <= 3


def test_a_copy_of_a_folder_compiles_elsewhere_with_the_line_of_the_images_changed(tmp_path):
    for name in NAMES:
        copy = shutil.copytree(FOLDER / name, tmp_path / "mine" / name, ignore=shutil.ignore_patterns("__pycache__"))
        code = (copy / "component.py").read_text(encoding="utf-8")
        assert code.count("kfp_pipeline") == 1
        images = 'IMAGES = dict.fromkeys(("importer", "dataset", "trainer", "coordinator"), "ghcr.io/mine:1")\n'
        (copy / "component.py").write_text(code.replace(IMAGES_LINE, images), encoding="utf-8")
    compiles = "".join(
        f"from mine.{name} import {name}; compiler.Compiler().compile({name}, '{name}.yaml'); " for name in NAMES
    )
    guard = "import sys; sys.modules['kfp_pipeline'] = sys.modules['draft_model'] = None; from kfp import compiler; "
    subprocess.run([sys.executable, "-c", guard + compiles], cwd=tmp_path, check=True)
    made = [next(yaml.safe_load_all((tmp_path / f"{name}.yaml").read_text())) for name in NAMES]
    executors = [executor for spec in made for executor in spec["deploymentSpec"]["executors"].values()]
    assert {executor["container"]["image"] for executor in executors} == {"ghcr.io/mine:1"}
