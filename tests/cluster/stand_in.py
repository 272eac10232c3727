"""A program for pods that leaves what a trainer leaves, when and how a test says: see `let_end` in the fault tests."""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from draft_model import storage
from draft_model.training import TrainConfig


def main() -> int:
    config = TrainConfig.from_json(os.environ["DRAFT_MODEL_JOB"])
    print("stand-in begins", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    order = storage.join(config.output, "stand-in")
    while not storage.exists(order):
        time.sleep(0.2)
    what = storage.read_bytes(order).decode()
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "mistake":
        problems = {"problems": ["draft_model_config: is no JSON"]}
        Path(os.environ["DRAFT_MODEL_TERMINATION_LOG"]).write_text(json.dumps(problems))
        return 2
    if what == "whole" and os.environ["PET_NODE_RANK"] == "0":
        with tempfile.TemporaryDirectory() as folder:
            record = {"steps": 3, "log": [{"loss": [1.5]}], "acceptance_length": 1.2}
            (Path(folder) / "training.json").write_text(json.dumps(record))
            storage.publish(Path(folder), storage.join(config.output, "final"), stage="train", properties={})
    return 0


if __name__ == "__main__":
    sys.exit(main())
