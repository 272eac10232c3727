"""One tiny target and its data sets, made by the real stages, and trainings of it in this process."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tiny
from safetensors.torch import load_file, save_file

from draft_model import dataset, model_import, storage
from draft_model.parameters import Parameters
from draft_model.training import TrainConfig, TrainResult
from draft_model.training.job import run

DRAFT_VOCABULARY = 128
CONVERSATIONS = 13  # with four to a step every epoch leaves some over for the next
QUICK = {
    "num_epochs": 4,
    "draft_global_batch_size": 4,
    "draft_micro_batch_size": 2,
    "ttt_length": 3,
    "learning_rate": 1e-2,
    "warmup_ratio": 0.2,
    "log_steps": 1,
    "compute_dtype": "float32",
}


@dataclass(frozen=True)
class Inputs:
    """What trainings of the tests read."""

    model: str  # URI of the imported target
    dataset: str  # URI of the data set, with a validation split
    other: str  # URI of a data set of other words, and so of another vocabulary of the same size
    draft_config: str  # file that sets the draft's vocabulary size


def make_inputs(folder: Path) -> Inputs:
    """The stages before the training, on a tiny target."""
    model = import_model(folder, tiny.write_target(folder / "source"))
    draft_config = folder / "draft.json"
    draft_config.write_text(json.dumps({"draft_vocab_size": DRAFT_VOCABULARY}))
    rows = tiny.conversations(CONVERSATIONS)
    shouted = [
        {"conversations": [turn | {"content": turn["content"].upper()} for turn in row["conversations"]]}
        for row in rows
    ]

    validation = tiny.write_jsonl(folder / "validation.jsonl", tiny.conversations(5, seed=1))
    split = {"dataset_validation_split": str(validation), "draft_model_config": str(draft_config)}
    return Inputs(
        model,
        build_dataset(folder / "dataset", model, rows, **split),
        build_dataset(folder / "other", model, shouted, **split),
        str(draft_config),
    )


def import_model(folder: Path, source: Path) -> str:
    """The import stage on a Transformers folder; gives the URI of what it wrote."""
    p = Parameters(pytorch_model_path=str(source))
    return model_import.run(model_import.ImportConfig(str(folder / "model"), folder / "work", p)).uri


def build_dataset(folder: Path, model: str, rows: list[dict], **parameters: str) -> str:
    """The dataset stage on some conversations; gives the URI of what it built."""
    folder.mkdir(exist_ok=True)
    given = Parameters(
        dataset_train_split=str(tiny.write_jsonl(folder / "rows.jsonl", rows)),
        chat_template="qwen",
        build_dataset_num_proc=1,
        **parameters,
    )
    return dataset.run(dataset.DatasetConfig(model, str(folder / "built"), given, folder / "work")).uri


def changed(uri: str, to: Path, change) -> str:
    """A copy of a stage's folder that `change` has worked on, and that is whole again."""
    manifest, folder = storage.read_manifest(uri), shutil.copytree(uri, to)
    change(folder)
    storage.publish(folder, str(folder), stage=manifest.stage, properties=manifest.properties)
    return str(folder)


def with_weight(model: str, to: Path, name: str, row: int, value: float) -> str:
    """A copy of an imported target, a row of one of whose weights has this value."""

    def change(folder):
        (weights,) = folder.glob("*.safetensors")
        tensors = load_file(weights)
        tensors[name][row] = value
        save_file(tensors, weights, metadata={"format": "pt"})

    return changed(model, to, change)


@dataclass(frozen=True)
class Trained:
    """A training that ended, with what it says of itself."""

    result: TrainResult

    @property
    def output(self) -> str:
        return self.result.output

    @property
    def record(self) -> dict:
        """training.json, which must be JSON in the strict sense."""
        return json.loads(self.read("final/training.json"), parse_constant=_refuse)

    @property
    def losses(self) -> dict[int, list[float]]:
        """Loss of every unroll step, by the step that logged it."""
        return {record["step"]: record["loss"] for record in self.record["log"]}

    @property
    def validations(self) -> dict[int, list[float]]:
        return {record["step"]: record["loss"] for record in self.record["validation"]}

    @property
    def checkpoints(self) -> list[str]:
        return json.loads(self.read("checkpoints.json"))

    def read(self, name: str) -> bytes:
        return storage.read_bytes(storage.join(self.output, name))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} in training.json")


class Trainer:
    """Trains in this process; every training has an output of its own unless it names one.

    Args:
        inputs: read by all trainings.
        folder: for outputs and scratch folders.
    """

    def __init__(self, inputs: Inputs, folder: Path) -> None:
        self.inputs, self.folder, self._count = inputs, folder, 0

    def config(
        self, output: str | None = None, *, model: str | None = None, dataset: str | None = None, **parameters
    ) -> TrainConfig:
        """A training with the quick parameters, and these over them."""
        self._count += 1
        values = {**QUICK, "draft_model_config": self.inputs.draft_config, **parameters}
        return TrainConfig(
            model=model or self.inputs.model,
            dataset=dataset or self.inputs.dataset,
            output=output or str(self.folder / f"output-{self._count}"),
            work=self.folder / f"work-{self._count}",
            parameters=Parameters(**values),
        )

    def __call__(self, output: str | None = None, **settings) -> Trained:
        return Trained(self.run(self.config(output, **settings)))

    def run(self, config: TrainConfig) -> TrainResult:
        """Trains by a configuration of `config`."""
        return run(config)


@contextmanager
def when_logged(text: str, act):
    """Calls `act` when a log line of ours that holds `text` is written, in the thread that writes it."""

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage():
                act()

    logger, watch = logging.getLogger("draft_model"), Watch()
    logger.addHandler(watch)
    try:
        yield
    finally:
        logger.removeHandler(watch)
