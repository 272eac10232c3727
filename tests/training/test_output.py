"""Which checkpoints stay, which one is served, and what happens while the object store is away."""

import errno
import json
import re
import shutil
import threading
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import boto3
import pytest
import torch
from safetensors.torch import load_file
from storage.relay import Relay

from draft_model import storage
from draft_model.entrypoint import user_error
from draft_model.errors import DraftModelError
from draft_model.storage import s3 as transfers
from draft_model.training import job, lease
from draft_model.training import output as outputs
from draft_model.training.job import read_resumed
from draft_model.training.output import Output
from draft_model.training.prepare import fetch_inputs
from training.case import changed, when_logged, with_weight
from training.processes import start, train_killed_in


def folders(trained):
    return sorted(path.parent.name for path in Path(trained.output).glob("*/manifest.json"))


def test_only_the_newest_stay_when_that_is_asked_for(train, plain):
    trained = train(keep_checkpoints=2)
    assert trained.checkpoints == ["epoch_3", "epoch_4"]
    assert folders(trained) == ["epoch_3", "epoch_4", "final"]
    assert sorted(path.name for path in Path(trained.output).iterdir()) == [
        "checkpoints.json", "epoch_3", "epoch_4", "final"
    ]  # fmt: skip
    assert trained.losses == plain.losses


def test_the_best_on_the_validation_split_stays_and_becomes_final_and_the_last_says_where_it_was(train, caplog):
    # So high a rate that the first epoch is the best and the later ones forget it.
    settings = {"learning_rate": 0.3, "warmup_ratio": 0.0, "num_epochs": 6, "num_speculative_tokens": 3}
    with caplog.at_level("INFO", "draft_model"):
        every = train(**settings)
    found = {record["epoch"]: record["acceptance_length"] for record in every.record["validation"]}
    best = max(found, key=found.__getitem__)
    assert best < 6
    assert found[best] > found[6]
    step = storage.read_manifest(f"{every.output}/epoch_{best}").properties["step"]
    assert every.record["best"] == {"step": step, "epoch": best, "acceptance_length": found[best]}
    assert every.record["acceptance_length"] == found[6]
    assert f"the best on the validation split was step {step}, epoch {best}" in caplog.text
    assert "final_checkpoint=best would have served it" in caplog.text
    trained = train(keep_checkpoints=1, final_checkpoint="best", **settings)
    assert trained.checkpoints == [f"epoch_{best}", "epoch_6"]
    assert trained.read("final/model.safetensors") == every.read(f"epoch_{best}/model.safetensors")
    assert trained.record["draft_step"] == step
    assert every.record["draft_step"] == every.record["steps"]
    files = {file.path for file in storage.read_manifest(trained.result.final).files}
    assert not [name for name in files if name.startswith("training_state")]
    assert trained.result.acceptance_length == found[best]


def test_the_best_needs_a_validation_split(train, inputs, tmp_path):
    dataset = changed(inputs.dataset, tmp_path / "copy", lambda to: shutil.rmtree(to / "validation"))
    with pytest.raises(DraftModelError, match=r"final_checkpoint: given 'best'.*use 'last'"):
        train(dataset=dataset, final_checkpoint="best")


def test_a_damaged_newest_is_not_all_that_is_left(train, plain, tmp_path):
    """Thinning out counts what is listed, so the one before a damaged checkpoint is there to go on from."""
    kept = shutil.copytree(train(keep_checkpoints=2).output, tmp_path / "kept")
    shutil.rmtree(kept / "final")
    (kept / "epoch_4/model.safetensors").write_bytes(b"")
    assert train(str(kept), resume="true", keep_checkpoints=2).losses == plain.losses


def test_the_only_whole_one_outlives_a_kill_in_the_epoch_that_it_ended_early(train, tmp_path, caplog):
    begun = train(total_steps=5, keep_checkpoints=1)  # in the middle of the second epoch
    assert folders(begun) == ["epoch_2", "final"]
    config = train.config(begun.output, total_steps=6, keep_checkpoints=1, resume="true")
    place = ("draft_model.storage.local:LocalFolder.write", "step_6/manifest.json")
    process = start(train_killed_in, config.to_json(), *place, log=tmp_path / "log")
    process.join()
    assert process.exitcode == -9, (tmp_path / "log").read_text()
    assert storage.read_manifest(f"{begun.output}/epoch_2").properties["step"] == 5
    ended = train(begun.output, total_steps=6, keep_checkpoints=1, resume="true")
    assert "at step 5 of 6" in caplog.text
    assert ended.checkpoints == ["step_6"]
    assert folders(ended) == ["final", "step_6"]


def test_what_a_killed_process_left_in_a_store_is_removed(object_store, tmp_path):
    uri = f"s3://{object_store.bucket}/torn"
    client = boto3.client("s3")
    begun = client.create_multipart_upload(Bucket=object_store.bucket, Key="torn/step_5/model.safetensors")
    part = {"Bucket": object_store.bucket, "Key": begun["Key"], "UploadId": begun["UploadId"], "PartNumber": 1}
    client.upload_part(**part, Body=b"x" * 1000)
    storage.write_bytes(f"{uri}/step_5/config.json", b"{}")
    storage.write_bytes(f"{uri}/checkpoints.json", b'["step_5"]')
    Output(uri, tmp_path).tidy()
    listed = client.list_objects_v2(Bucket=object_store.bucket, Prefix="torn/")["Contents"]
    assert [item["Key"] for item in listed] == ["torn/checkpoints.json"]
    assert storage.read_bytes(f"{uri}/checkpoints.json") == b"[]"
    assert not client.list_multipart_uploads(Bucket=object_store.bucket, Prefix="torn/").get("Uploads")


@pytest.fixture
def leaving(object_store, monkeypatch):
    """A relay to the store, which is away from the first checkpoint's state on."""
    with Relay(object_store.environment["AWS_ENDPOINT_URL"]) as relay:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, relay.endpoint)
        monkeypatch.setattr(transfers, "_PAUSES", (0.02, 0.1))

        def leave(request):
            if "state.safetensors" in request.path:
                relay.away = 1 << 30

        relay.refuse = leave
        yield relay


def start_once(thread):
    with suppress(RuntimeError):
        thread.start()


def test_training_goes_on_while_the_store_is_away_and_nothing_is_lost(train, plain, object_store, leaving, caplog):
    uri = f"s3://{object_store.bucket}/away"

    def come_back():
        leaving.refuse, leaving.away = lambda request: None, 0

    back = threading.Barrier(2, come_back)  # when three more epochs are trained, and the upload was retried
    once = {text: threading.Thread(target=back.wait) for text in ("step 9, ", "next try in")}
    with ExitStack() as both:
        for text, thread in once.items():
            both.enter_context(when_logged(text, partial(start_once, thread)))
        trained = train(uri)
    assert trained.losses == plain.losses
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("draft_model")]
    (first, *_), retried = (
        [number for number, text in enumerate(messages) if part in text]
        for part in ("checkpoint epoch_1: ", "next try in")
    )
    reached = next(number for number, text in enumerate(messages) if text.startswith("step 9, "))
    assert retried
    assert max(min(retried), reached) < first
    for name in (*plain.checkpoints, "final"):
        assert storage.read_manifest(f"{uri}/{name}")
    assert trained.read("epoch_1/model.safetensors") == plain.read("epoch_1/model.safetensors")


@pytest.mark.usefixtures("leaving")
def test_a_store_that_stays_away_ends_the_training_and_the_checkpoint_stays_here(
    train, plain, object_store, monkeypatch
):
    monkeypatch.setattr(outputs, "PATIENCE", 0.3)
    monkeypatch.setattr(lease, "SECONDS", 2.0)
    with pytest.raises(DraftModelError) as caught:
        train(f"s3://{object_store.bucket}/gone")
    reason, kept = caught.value.problems
    assert "cannot be reached" in reason
    folder = kept.partition("it stays in ")[2].partition(",")[0]
    assert "resume_from_checkpoint" in kept
    assert not Path(folder).is_relative_to(train.folder / "work-1")  # which the process removes at its end
    resumed = train(resume="true", resume_from_checkpoint=folder)
    assert resumed.losses == plain.losses
    assert load_file(f"{folder}/model.safetensors")


def test_refused_keys_are_not_tried_again(train, object_store, monkeypatch, caplog):
    uri = f"s3://{object_store.bucket}/refused"

    def lose_the_keys():
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")

    with when_logged("step 2, ", lose_the_keys), pytest.raises(DraftModelError, match="refuses the keys"):
        train(uri)
    assert "next try in" not in caplog.text


@pytest.mark.parametrize(
    ("index", "told"), [(None, "is missing"), ('["epoch_1", "epo', "is damaged"), ('{"epoch_1": 1}', "is damaged")]
)
def test_checkpoints_are_found_without_their_index(train, plain, tmp_path, caplog, index, told):
    output = shutil.copytree(plain.output, tmp_path / "output")
    (output / "checkpoints.json").unlink()
    (output / "epoch_4/manifest.json").unlink()
    if index is not None:
        (output / "checkpoints.json").write_text(index)
    resumed = train(str(output), resume="true")
    found = f"checkpoints.json {told}; whole checkpoints there: epoch_1, epoch_2, epoch_3"
    assert found in caplog.text
    assert resumed.losses == plain.losses
    assert resumed.checkpoints == ["epoch_1", "epoch_2", "epoch_3", "epoch_4"]


def test_an_index_cannot_name_other_folders(tmp_path):
    (tmp_path / "checkpoints.json").write_text(json.dumps(["epoch_1", "../other", "/etc", "epoch_1/x", 7]))
    output = Output(str(tmp_path), tmp_path, newest=1, best=True)
    assert (output.names(), output.best()) == (["epoch_1"], None)


def test_a_full_disk_is_a_sentence_and_what_a_killed_attempt_left_is_swept(train, monkeypatch, tmp_path):
    config = train.config()
    left = config.work / "rank_0/checkpoints/epoch_1/model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"left")

    def full(folder, *_):
        assert not left.exists()
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(job, "write_checkpoint", full)
    with pytest.raises(OSError, match="No space") as caught:
        train.run(config)
    assert re.search(r"epoch_1: No space left on device; make room", str(user_error(caught.value)))


def test_a_target_of_nan_is_refused_before_the_first_step(train, inputs, tmp_path):
    model = with_weight(inputs.model, tmp_path / "nan", "model.layers.1.mlp.up_proj.weight", 3, float("nan"))
    with pytest.raises(DraftModelError, match=r"its weight model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        train(model=model)


def test_the_first_process_of_a_machine_verifies_the_inputs_and_the_others_trust_it(train, inputs, monkeypatch):
    config, fetched = train.config(), []
    fetch = storage.fetch
    monkeypatch.setattr(storage, "fetch", lambda uri, into: fetched.append(uri) or fetch(uri, into))
    for processes, expected in (("2", 2), ("2", 2), ("1", 4)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        found = fetch_inputs(config)
        assert (str(found.model), str(found.dataset)) == (inputs.model, inputs.dataset)
        assert len(fetched) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # another start of the job
    assert fetch_inputs(config) == found
    assert len(fetched) == 6


def test_the_first_process_of_a_machine_fetches_the_checkpoint_and_the_others_trust_it(train, monkeypatch):
    trained = train(total_steps=1)
    config, fetched = train.config(trained.output, resume="true"), []
    fetch = storage.fetch
    monkeypatch.setattr(storage, "fetch", lambda uri, into: fetched.append(into) or fetch(uri, into))

    def read():
        with Output(config.checkpoints, config.work / "rank_0") as output:
            return read_resumed(config, output)

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (first, go_on), (second, also) = read(), read()
    assert fetched == [config.work / "resumed"]
    assert go_on is also is True
    assert second.uri == first.uri == f"{trained.output}/{trained.checkpoints[-1]}"
    assert second.position == first.position
    assert second.state.keys() == first.state.keys()
    assert all(torch.equal(second.state[name], tensor) for name, tensor in first.state.items())
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # another start of the job
    read()
    assert fetched[1:] == fetched[:1]


def test_a_start_that_another_machine_caused_looks_for_checkpoints_again(train, monkeypatch):
    """It has the same restart count, so the marker has to be gone before a checkpoint is written."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config, known, learn = train.config(), [], job.train
    monkeypatch.setattr(
        job, "train", lambda *given: known.append({path.name for path in config.work.iterdir()}) or learn(*given)
    )
    job.run(config)
    assert "inputs.json" in known[0]
    assert "resumed.json" not in known[0]
