"""What the components' tests share: artifacts on this disk, and a run of all components on a tiny target, once."""

import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
from kfp import dsl

from draft_model.doors import ERROR_FILE
from kfp_pipeline.components.build_dataset import build_dataset
from kfp_pipeline.components.encode_dataset import encode_dataset
from kfp_pipeline.components.import_model import import_model
from kfp_pipeline.components.import_tokenizer import import_tokenizer
from kfp_pipeline.components.plan_dataset import plan_dataset
from kfp_pipeline.components.train_draft_model import train_draft_model


def pytest_collection_modifyitems(items):
    """One process runs these tests, so that there is one run for all of them."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.xdist_group("components"))


KINDS = {"summary": dsl.Markdown, "card": dsl.Markdown, "report": dsl.HTML, "metrics": dsl.Metrics}


@dataclass
class Call:
    """One call of a component: its outputs, and what it has left in its artifacts."""

    folder: Path
    artifacts: dict[str, Any] = field(default_factory=dict)
    output: Any = None

    def of(self, component, **given):
        """Calls the component's function as KFP's executor does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in component.component_spec.outputs or {}:
            if name in component.python_func.__annotations__:
                self.artifacts[name] = KINDS.get(name, dsl.Artifact)(uri=str(self.folder / name))
        before = signal.getsignal(signal.SIGTERM)
        try:
            self.output = component.python_func(**given, **self.artifacts)
        finally:
            signal.signal(signal.SIGTERM, before)
        return self

    def text(self, name: str) -> str:
        """What an artifact shows."""
        return (self.folder / name).read_text(encoding="utf-8")

    @property
    def metrics(self) -> dict[str, float]:
        """What was logged."""
        return self.artifacts["metrics"].metadata


@pytest.fixture
def call(tmp_path):
    """Calls a component."""
    return lambda component, **given: Call(tmp_path / component.python_func.__name__).of(component, **given)


@pytest.fixture
def refusal(call, tmp_path, monkeypatch):
    """The problems of a component that ends as for a user's mistake."""

    def refusal(component, **given):
        told = tmp_path / "problems.json"
        monkeypatch.setenv(ERROR_FILE, str(told))
        with pytest.raises(SystemExit) as ended:
            call(component, **given)
        assert ended.value.code == 2
        return json.loads(told.read_text(encoding="utf-8"))

    return refusal


@dataclass
class World:
    """A run on a tiny target: parameters by stage, and the calls by component."""

    root: Path
    source: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    calls: dict[str, Call] = field(default_factory=dict)

    def call(self, component, **given):
        name = component.python_func.__name__
        self.calls[name] = Call(self.root / name).of(component, **given)
        return self.calls[name].output


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("components")
    (root / "draft.json").write_text('{"draft_vocab_size": 200}')
    config = {"draft_model_config": str(root / "draft.json")}
    train = tiny.write_jsonl(root / "train.jsonl", tiny.conversations(16))
    validation = tiny.write_jsonl(root / "validation.jsonl", tiny.conversations(4, seed=1))
    source = {"pytorch_model_path": str(tiny.write_target(root / "target"))}
    data = {"dataset_train_split": str(train), "dataset_validation_split": str(validation), "chat_template": "qwen"}
    training = {**config, "num_epochs": 1, "ttt_length": 2, "compute_dtype": "float32", "training_backend": "local"}
    return World(root, source, {**data, **config, "max_length": 64}, training)


@pytest.fixture(scope="session")
def imported(world):
    """URIs of the tokenizer and of the model, and the model's version."""
    uri, version = world.call(import_tokenizer, **world.source, run_id="first")
    return uri, version, world.call(import_model, **world.source, version=version)


@pytest.fixture(scope="session")
def dataset(world, imported):
    """URI of the data set, encoded in two parts."""
    uri, version, _ = imported
    parts = world.call(plan_dataset, **world.data, model_uri=uri, model_version=version, dataset_pods=2)
    uris = [world.call(encode_dataset, **world.data, part=part) for part in parts]
    return world.call(build_dataset, **world.data, model_uri=uri, parts=parts, uris=uris)


@pytest.fixture(scope="session")
def trained(world, imported, dataset):
    """URI of the draft."""
    given = {"model_uri": imported[2], "dataset_uri": dataset, "run_id": "first"}
    return world.call(train_draft_model, **given, **world.training)
