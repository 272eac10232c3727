"""What the import's tests share: a tiny target, and imports of it."""

import shutil

import pytest
import tiny
import torch

from draft_model import storage
from draft_model.errors import DraftModelError
from draft_model.model_import import ImportConfig, run
from draft_model.parameters import Parameters

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    return tiny.write_target(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture
def model(target, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(target, tmp_path / "mine")


@pytest.fixture
def bring(tmp_path):
    """Imports a model; gives the result."""

    def bring(output=None, root="", **source):
        output = output or str(tmp_path / "out")
        return run(ImportConfig(output, tmp_path / "work", Parameters(**source), root=root))

    return bring


@pytest.fixture
def refusal(bring, tmp_path):
    """The problems of an import that must fail; nothing is published then."""

    def refusal(**source):
        with pytest.raises(DraftModelError) as caught:
            bring(**source)
        assert not storage.exists(str(tmp_path / "out"))
        return caught.value.problems

    return refusal


@pytest.fixture
def only(refusal):
    """The one problem of a folder."""

    def only(folder):
        (problem,) = refusal(pytorch_model_path=str(folder))
        assert problem.startswith(f"target model {folder}: ")
        return problem

    return only


@pytest.fixture
def upload(object_store):
    """Puts a folder into the object store; gives its URI."""
    import uuid

    def upload(folder, below=""):
        uri = f"s3://{object_store.bucket}/{uuid.uuid4().hex}"
        for path in folder.rglob("*"):
            if path.is_file():
                storage.write_bytes(f"{uri}{below}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return uri

    return upload
