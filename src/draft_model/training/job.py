"""`run`: one process of a training job, from its inputs at URIs to the draft at a URI.

Every process fetches what it needs under a lock file of its machine, so that the first one downloads and verifies and
the others trust it; no process waits in a collective for a download.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draft_model import storage
from draft_model.drafts.files import save_draft
from draft_model.errors import DraftModelError
from draft_model.model_import import is_weight
from draft_model.processes import catch_sigterm
from draft_model.ranks import PeerLost, Ranks, hardware, start_ranks
from draft_model.scratch import working_in
from draft_model.tracking import Tracker, track
from draft_model.training.checkpoint import RECORD, STATE, Loaded, load_checkpoint, read_checkpoint, write_checkpoint
from draft_model.training.config import TrainConfig, TrainResult
from draft_model.training.lease import Lease, hold, own_run_id
from draft_model.training.output import CHECKPOINTS_AT_ONCE, Output
from draft_model.training.plan import STATE_BYTES, context_problem
from draft_model.training.prepare import fetch_inputs, once_on_machine, prepare
from draft_model.training.trainer import Interrupted, Training, train

logger = logging.getLogger(__name__)

STAGE = "train"
RESUMED = "resumed"
_PACKAGES = ("pipeline-draft-model", "torch", "transformers", "tokenizers", "safetensors", "datasets")
_OTHERS_FIRST = 10.0
"""Seconds that a process waits for torchrun to end it when another is lost, so that the other's end is seen first."""


def run(config: TrainConfig) -> TrainResult:
    """Trains a draft in this process, together with the others that torchrun started with the same config.

    Raises:
        DraftModelError: for what the user can put right; no `final` is published then.
        Interrupted: on SIGTERM, after a checkpoint.
        PeerLost: when another process of the job is gone.
    """
    p = config.parameters
    with (
        working_in(config.work),
        start_ranks(timedelta(minutes=p.dist_timeout), p.tp_size) as ranks,
        _leases(config, ranks) as leases,
    ):
        if ranks.device.type == "cpu":  # on a GPU it costs speed and memory, and flash attention is not deterministic
            torch.set_deterministic_debug_mode("warn")  # `use_deterministic_algorithms` imports inductor: seconds
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        logging.getLogger("draft_model").setLevel(logging.INFO if ranks.first else logging.ERROR)
        work = config.work / f"rank_{ranks.rank}"
        shutil.rmtree(work, ignore_errors=True)  # what a killed attempt left
        work.mkdir(parents=True)
        inputs = fetch_inputs(config)
        tracking = track(STAGE, p.mlflow_tracking_uri) if ranks.first else nullcontext(Tracker())
        keep = (p.keep_checkpoints, p.final_checkpoint == "best")
        with tracking as tracker, Output(config.checkpoints, work, config.output, leases, *keep) as output:
            resumed, go_on = read_resumed(config, output)
            training = prepare(config, ranks, inputs, resumed, go_on)
            needed = STATE_BYTES * parameters_of(training) * CHECKPOINTS_AT_ONCE + (64 << 20)
            if (free := shutil.disk_usage(work).free) < needed:
                raise DraftModelError(
                    f"disk: {work} has {free / 1e9:.2f} GB free, and {CHECKPOINTS_AT_ONCE} checkpoints on their way to "
                    f"the output need {needed / 1e9:.2f} GB: free some, or run in another folder"
                )
            ranks.barrier()  # all have read what there was before any of it goes
            # Another node's failure restarts this one with the count of restarts as it was.
            (config.work / f"{RESUMED}.json").unlink(missing_ok=True)
            if ranks.first:
                output.tidy() if go_on else output.clear()
            announce(training)
            training.tracker = tracker
            tracker.parameters(p.of_stage("train"))
            target = (config.model, inputs.source.get("digest", ""))
            tracker.inputs({"target": target, "dataset": (config.dataset, training.dataset)})

            def complete(folder: Path, step: int) -> None:
                """Puts beside the weights what a served draft has: tokenizer files and the training's record."""
                for path in sorted(inputs.model.iterdir()):
                    others = path.name in ("config.json", storage.MANIFEST) or is_weight(path.name)
                    if path.is_file() and not others:
                        shutil.copyfile(path, folder / path.name)
                text = json.dumps(record(training, inputs.source, inputs.dataset, step), indent=1)
                (folder / RECORD).write_text(text + "\n", encoding="utf-8")

            def save(name: str, epoch: int, random: list[Tensor]) -> None:
                where = {"step": training.done, "epoch": epoch, "run_id": config.run_id}
                acceptance = {"acceptance_length": training.history.validated(training.done)}
                folder = output.room(name)
                write_checkpoint(folder, training.draft, training.optimizer, training.position(epoch), random)
                complete(folder, training.done)
                output.upload(folder, where | acceptance)

            with catch_sigterm() as stop:
                try:
                    train(training, save, lambda: stop() or any(lease.lost for lease in leases))
                except Interrupted:
                    output.finish()
                    ranks.barrier()  # no process's end may cut the last upload short
                    raise
                output.finish()
                step = _publish_final(output, training, complete, work) if ranks.first else 0
                step = int(ranks.sum(torch.tensor(float(step))))
            tracker.references({"output": config.output, "checkpoints": config.checkpoints, "final": output.final})
        told = record(training, inputs.source, inputs.dataset, step)
        return TrainResult.from_record(config.output, output.final, told)


@contextmanager
def _leases(config: TrainConfig, ranks: Ranks) -> Iterator[list[Lease]]:
    """The leases on the folders that a training writes to, in the process that writes."""
    run_id, own = config.run_id or own_run_id(), config.parameters.checkpoint_path
    folders = {"output": config.output if own != config.output else "", "checkpoint_path": own}
    with ExitStack() as stack:
        leases = (hold(uri, run_id, outermost=False, parameter=name) for name, uri in folders.items() if ranks.first)
        held = [stack.enter_context(lease) for lease in leases]
        ranks.barrier()  # no process reads what is there while another run may change it
        yield [lease for lease in held if lease]


def read_resumed(config: TrainConfig, output: Output) -> tuple[Loaded | None, bool]:
    """The checkpoint that the parameters mean, and whether to go on from it or to start from its weights.

    It is fetched and verified once on each machine.
    """
    p, work = config.parameters, config.work / RESUMED
    mine: list[Loaded | None] = []

    def fetch() -> dict[str, Any]:
        any_run = p.resume == "true" or config.again
        loaded = output.newest(work, "" if any_run else config.run_id) if any_run or config.run_id else None
        go_on = loaded is not None or p.resume == "true"
        if loaded is None and p.resume_from_checkpoint:
            loaded = read_checkpoint(p.resume_from_checkpoint, work)
        if loaded is None and go_on:
            raise DraftModelError(
                f"resume: given 'true', but there is no whole checkpoint under {config.checkpoints}, and "
                "resume_from_checkpoint is not given: name one there, or use resume=false"
            )
        mine.append(loaded)
        return {"uri": loaded and loaded.uri, "folder": loaded and str(loaded.folder), "go_on": go_on}

    known = once_on_machine(config.work, RESUMED, fetch)
    loaded = mine[0] if mine else known["uri"] and load_checkpoint(known["uri"], Path(known["folder"]))
    return loaded, known["go_on"]


def _publish_final(output: Output, training: Training, complete: Callable[[Path, int], None], work: Path) -> int:
    """Puts the draft to serve under the output; returns the step of its weights."""
    folder, step, history = work / "final", training.done, training.history
    name = output.best() if output.keeps_best else None
    if name is None:
        save_draft(folder, training.draft)
        best = history.best
        if best and len(history.validation) > 1 and best["step"] != step:
            logger.info(
                "final is step %d, acceptance length %.2f (simulated); the best on the validation split was step %d, "
                "epoch %d, with %.2f: final_checkpoint=best would have served it",
                step, history.acceptance_length(step), best["step"], best["epoch"], best["acceptance_length"],
            )  # fmt: skip
    else:
        uri = storage.join(output.uri, name)
        found = storage.fetch(uri, work / "best")
        step = int(storage.read_manifest(uri).properties["step"])
        shutil.copytree(found, folder, ignore=shutil.ignore_patterns(STATE, storage.MANIFEST))
        logger.info("final is %s, of the highest simulated acceptance length: step %d of %d", name, step, training.done)
    complete(folder, step)
    output.publish_final(folder, stage=STAGE, properties={"step": step})
    shutil.rmtree(folder)
    return step


def announce(training: Training) -> None:
    """Logs how the work is shared out, and how much there is."""
    p, world = training.parameters, training.ranks.world
    config, text = training.draft.config, training.target.config
    tokens = training.train.lengths.mean() * p.draft_global_batch_size
    logger.info(
        "%d process(es) on %s: tensor parallel %d, data parallel %d; %d conversations per step = %d processes x "
        "micro-batch %d x accumulation %d, about %d tokens",
        world, hardware(training.ranks.device), p.tp_size, training.ranks.dp, p.draft_global_batch_size, world,
        p.draft_micro_batch_size, p.accumulation_steps, tokens,
    )  # fmt: skip
    logger.info(
        "%d conversations, %.1f steps per epoch, %d steps in all; draft of %.1f M parameters, vocabulary %d of %d, "
        "features after layers %s of %d; computing in %s",
        len(training.train), len(training.train) / p.draft_global_batch_size, training.total,
        parameters_of(training) / 1e6, config.draft_vocab_size, config.vocab_size, list(config.aux_layers),
        text.num_hidden_layers, p.compute_dtype,
    )  # fmt: skip
    if problem := context_problem(text.to_dict(), p.max_length):
        logger.warning("%s", problem)


def parameters_of(training: Training) -> int:
    """Parameters that are trained."""
    return sum(parameter.numel() for parameter in training.draft.parameters())


def record(training: Training, source: Mapping[str, Any], dataset: Path, step: int) -> dict[str, Any]:
    """training.json: what was trained, on what, with what result; the draft beside it has the weights of `step`."""
    target, history, done = training.target, training.history, training.done
    return {
        "parameters": training.parameters.of_stage("train"),
        "draft": training.draft.config.to_json(),
        "draft_parameters": parameters_of(training),
        "target": {
            **{name: source[name] for name in ("source", "revision", "licence", "architecture")},
            "parameters": source["parameter_count"],
            "hidden_size": target.config.hidden_size,
            "layers": target.config.num_hidden_layers,
        },
        "dataset": json.loads((dataset / "report.json").read_text(encoding="utf-8")),
        "steps": done,
        "draft_step": step,
        "acceptance_length": history.acceptance_length(step),
        "best": history.best,
        "epochs": done * training.parameters.draft_global_batch_size / len(training.train),
        "world_size": training.ranks.world,
        "tokens": history.tokens,
        "seconds": history.seconds,
        "tokens_per_second": history.tokens / max(history.seconds, 1e-9),
        "log": history.log,
        "validation": history.validation,
        "skipped": history.skipped,
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in _PACKAGES}},
        "hardware": hardware(training.ranks.device),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        return "not installed"


def main() -> int:
    """`torchrun -m draft_model.training`, in a job's pod or beside the command line; DRAFT_MODEL_JOB configures it."""
    from draft_model.entrypoint import TERMINATED, exit_code

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
            (config.work / "result.json").write_text(json.dumps(asdict(result)), encoding="utf-8")

    return exit_code(work)
