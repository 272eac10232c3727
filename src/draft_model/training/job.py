"""`run`: one process of a training job, from its inputs at URIs to the draft at a URI.

Every process fetches what it needs under a lock file of its machine, so that the first one downloads and the others
verify; nobody waits in a collective for a download.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from draft_model import storage
from draft_model.drafts.eagle3.export import save_draft
from draft_model.errors import DraftModelError
from draft_model.model_import import is_weight
from draft_model.processes import catch_sigterm
from draft_model.tracking import Tracker, track
from draft_model.training.checkpoint import STATE, Loaded, read_checkpoint, write_checkpoint
from draft_model.training.config import TrainConfig, TrainResult
from draft_model.training.lease import Lease, hold, own_run_id
from draft_model.training.output import CHECKPOINTS_AT_ONCE, Keeping, Output
from draft_model.training.prepare import prepare
from draft_model.training.ranks import PeerLost, Ranks, start_ranks
from draft_model.training.record import announce, record
from draft_model.training.trainer import Interrupted, Training, train

logger = logging.getLogger(__name__)

STAGE = "train"
_OTHERS_FIRST = 10.0
"""Seconds that a process waits for torchrun to end it when another is lost, so that the other's end is seen first."""


def run(config: TrainConfig) -> TrainResult:
    """Trains a draft in this process, together with the others that torchrun started.

    Args:
        config: the same in every process.

    Returns:
        What was trained and where it is; the same in every process.

    Raises:
        DraftModelError: for what the user can put right; no `final` is published then.
        Interrupted: on SIGTERM, after a checkpoint.
        PeerLost: when another process of the job is gone.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    p = config.parameters
    with start_ranks(timedelta(minutes=p.dist_timeout), p.tp_size) as ranks, _lease(config, ranks) as lease:
        logging.getLogger("draft_model").setLevel(logging.INFO if ranks.first else logging.ERROR)
        work = config.work / f"rank_{ranks.rank}"
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(config.work / "inputs.lock"):
            model = storage.fetch(config.model, config.work / "model")
            dataset = storage.fetch(config.dataset, config.work / "dataset")
        tracking = track(STAGE, p.mlflow_tracking_uri) if ranks.first else nullcontext(Tracker(None))
        keeping = Keeping(p.keep_checkpoints, p.final_checkpoint == "best")
        with tracking as tracker, Output(config.checkpoints, work, keeping, config.output, lease) as output:
            resumed, go_on = _checkpoint(config, output, work)
            training = prepare(config, ranks, model, dataset, resumed, go_on, work)
            _check_disk(training, work)
            ranks.any(False)  # all have read what there was before any of it goes
            if ranks.first:
                output.tidy() if go_on else output.clear()
            announce(training)
            _track_inputs(tracker, training, config)

            def complete(folder: Path, step: int) -> None:
                _complete(folder, training, model, dataset, config, step)

            def save(name: str, epoch: int, random: list[Tensor]) -> None:
                def write(folder: Path) -> None:
                    write_checkpoint(folder, training.draft, training.optimizer, training.position(epoch), random)
                    complete(folder, training.done)

                acceptance = training.history.validated(training.done)
                where = {"step": training.done, "epoch": epoch, "run_id": config.run_id}
                output.save(name, write, {**where, "acceptance_length": acceptance})

            with catch_sigterm() as stop:
                try:
                    train(training, save, lambda: stop() or (lease is not None and lease.lost))
                except Interrupted:
                    output.finish()
                    ranks.any(False)  # nobody's end may cut the last upload short
                    raise
                output.finish()
                step = _publish_final(output, training, complete, work) if ranks.first else 0
                step = int(ranks.sum(torch.tensor(float(step))))
            places = {"output": config.output, "checkpoints": config.checkpoints, "final": output.final}
            tracker.references(places)
    history = training.history
    return TrainResult(
        output=config.output,
        final=output.final,
        steps=training.done,
        loss=history.log[-1]["loss"][0],
        acceptance_length=history.validated(step) or history.acceptance_length,
    )


@contextmanager
def _lease(config: TrainConfig, ranks: Ranks) -> Iterator[Lease | None]:
    """The lease on the checkpoint_path, in the process that writes there."""
    if not config.parameters.checkpoint_path:
        yield None
        return
    held = hold(config.checkpoints, config.run_id or own_run_id(), outermost=False) if ranks.first else nullcontext()
    with held as lease:
        ranks.any(False)  # nobody reads what is there while another run may change it
        yield lease


def _track_inputs(tracker: Tracker, training: Training, config: TrainConfig) -> None:
    training.tracker = tracker
    tracker.parameters(config.parameters.of_stage("train"))
    digest = storage.read_manifest(config.model, stage="import").properties.get("digest", "")
    tracker.inputs({"target": (config.model, digest), "dataset": (config.dataset, training.dataset)})


def _checkpoint(config: TrainConfig, output: Output, work: Path) -> tuple[Loaded | None, bool]:
    """The checkpoint that the parameters mean, and whether to go on from it or to start from its weights."""
    p = config.parameters
    whoever = p.resume == "true" or config.again
    if (whoever or config.run_id) and (newest := output.newest("" if whoever else config.run_id)):
        return newest, True
    if p.resume_from_checkpoint:
        return read_checkpoint(p.resume_from_checkpoint, work / "resumed"), p.resume == "true"
    if p.resume == "true":
        raise DraftModelError(
            f"resume: given 'true', but there is no whole checkpoint under {config.checkpoints}, and "
            "resume_from_checkpoint is not given: name one there, or use resume=false"
        )
    return None, False


def _check_disk(training: Training, work: Path) -> None:
    """Checkpoints are written here before they are published: float32 weights, two moments, served weights."""
    one = sum(parameter.numel() for parameter in training.draft.parameters()) * (3 * 4 + 2)
    needed = one * CHECKPOINTS_AT_ONCE + (64 << 20)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise DraftModelError(
            f"disk: {work} has {free / 1e9:.2f} GB free, and {CHECKPOINTS_AT_ONCE} checkpoints on their way to the "
            f"output need {needed / 1e9:.2f} GB: free some, or run in another folder"
        )


def _publish_final(output: Output, training: Training, complete: Callable[[Path, int], None], work: Path) -> int:
    """Puts what is to be served under the output; gives the step of its weights."""
    folder = work / "final"
    shutil.rmtree(folder, ignore_errors=True)
    step = training.done
    best = output.best() if output.keeping.best else None
    if best is None:
        save_draft(folder, training.draft)
    else:
        found = storage.fetch(storage.join(output.uri, best), work / "best")
        step = int(storage.read_manifest(storage.join(output.uri, best)).properties["step"])
        ignored = shutil.ignore_patterns(STATE, storage.MANIFEST)
        shutil.copytree(found, folder, ignore=ignored)
        logger.info("final is %s, of the highest simulated acceptance length: step %d of %d", best, step, training.done)
    complete(folder, step)
    output.publish_final(folder, stage=STAGE, properties={"step": step})
    shutil.rmtree(folder)
    return step


def _complete(folder: Path, training: Training, model: Path, dataset: Path, config: TrainConfig, step: int) -> None:
    """Puts beside the weights what a served draft has: tokenizer files and the training's record."""
    for path in sorted(model.iterdir()):
        if path.is_file() and path.name not in ("config.json", storage.MANIFEST) and not is_weight(path.name):
            shutil.copyfile(path, folder / path.name)
    text = json.dumps(record(training, config, dataset, step), indent=1)
    (folder / "training.json").write_text(text + "\n", encoding="utf-8")


def main() -> int:
    """The job pod's door: `torchrun -m draft_model.training`, the configuration in DRAFT_MODEL_JOB."""
    from draft_model.doors import TERMINATED, exit_code

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def work() -> None:
        config = TrainConfig.from_json(os.environ["DRAFT_MODEL_JOB"])
        try:
            result = run(config)
        except Interrupted:
            raise SystemExit(TERMINATED) from None
        except PeerLost as lost:
            logger.error("process %d of %d ends, for another one is gone or does not answer: %s", rank, world, lost)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_OTHERS_FIRST)
            raise SystemExit(1) from None
        except Exception:
            if world > 1:
                logger.error("process %d of %d fails:", rank, world)
            raise
        if rank == 0:
            (config.work / "result.json").write_text(json.dumps(result.to_json()), encoding="utf-8")

    return exit_code(work)
