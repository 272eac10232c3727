"""The committed pipeline is what the sources compile to, and keeps the contract that its callers rely on."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from contract import CONTRACT

from draft_model.errors import DraftModelError
from draft_model.parameters import PARAMETERS
from draft_model.tracking import RUN
from kfp_pipeline.compile import COMPILED, MANIFEST, committed, compile_pipeline, version_name
from kfp_pipeline.components.images import IMAGES, KINDS, images_by_kind
from kfp_pipeline.watch import STEPS

ROOT = Path(__file__).parents[2]
DIGEST = "registry.example/trainer@sha256:" + "0" * 64
HANDLER = "exit-handler-1"
STORE = {"endpoint": "AWS_ENDPOINT_URL", "region": "AWS_DEFAULT_REGION"}
STORE_BY_NAME = (
    "AWS_MAX_ATTEMPTS", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION", "AWS_CA_BUNDLE",
)  # fmt: skip
ORDER = ["preflight", "import-model", "build-dataset", "train-draft-model", "evaluate-draft-model"]


def load(file):
    return list(yaml.load_all(file.read_text(encoding="utf-8"), yaml.CSafeLoader))


@pytest.fixture(scope="module")
def committed_documents():
    return load(COMPILED)


@pytest.fixture(scope="module")
def spec(committed_documents):
    return committed_documents[0]


@pytest.fixture(scope="module")
def settings(committed_documents):
    """What each step asks of Kubernetes."""
    platform = committed_documents[1]["platforms"]["kubernetes"]
    return {step.removeprefix("exec-"): each for step, each in platform["deploymentSpec"]["executors"].items()}


@pytest.fixture(scope="module")
def inputs(spec):
    return spec["root"]["inputDefinitions"]["parameters"]


@pytest.fixture(scope="module")
def tasks(spec):
    """All that a run does before its clean-up."""
    return spec["components"][f"comp-{HANDLER}"]["dag"]["tasks"]


def test_the_committed_files_are_up_to_date():
    written = committed()
    assert {COMPILED, MANIFEST} < written.keys()
    stale = [str(file) for file, text in written.items() if file.read_text(encoding="utf-8") != text]
    assert stale == [], "run `draft-model compile`"


def test_compiling_gives_the_same_bytes_in_another_process_and_folder(tmp_path):
    code = "import sys; from kfp_pipeline.compile import compile_pipeline; sys.stdout.write(compile_pipeline())"
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == compile_pipeline()


def test_the_shared_contract_check_passes():
    check = Path(os.environ.get("DRAFT_MODEL_CONTRACT", ROOT.parent / "shared/checks/contract"))
    if not check.exists():
        pytest.skip(f"{check} is not on this machine; DRAFT_MODEL_CONTRACT may name it")
    done = subprocess.run([sys.executable, check, COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_inputs_are_the_contracts(spec, inputs):
    kinds = {str: "STRING", int: "NUMBER_INTEGER", float: "NUMBER_DOUBLE"}
    expected = {name: (kinds[kind], default) for name, kind, default, _ in CONTRACT}
    assert {name: (inputs[name]["parameterType"], inputs[name]["defaultValue"]) for name in expected} == expected
    words = {name: list(allowed) for name, _, _, allowed in CONTRACT if isinstance(allowed, tuple)}
    assert {name: inputs[name]["literals"] for name in expected if "literals" in inputs[name]} == words
    assert spec["pipelineInfo"]["name"] == "pipeline-draft-model"


def test_every_input_has_a_default_that_fits_it_and_additions_are_inputs_too(inputs):
    assert inputs.keys() == {parameter.name for parameter in PARAMETERS}
    assert {name for name, found in inputs.items() if "defaultValue" not in found} == set()
    assert {p.name: inputs[p.name].get("literals") for p in PARAMETERS if p.choices} == {
        p.name: list(p.choices) for p in PARAMETERS if p.choices
    }


def test_the_output_is_a_folder_of_checkpoints(spec):
    model = {"artifactType": {"schemaTitle": "system.Model", "schemaVersion": "0.0.1"}}
    handler = spec["components"][f"comp-{HANDLER}"]
    for graph, task in ((handler, "train-draft-model"), (spec["root"], HANDLER)):
        assert graph["outputDefinitions"]["artifacts"] == {"output_model_path": model}
        (source,) = graph["dag"]["outputs"]["artifacts"]["output_model_path"]["artifactSelectors"]
        assert source == {"producerSubtask": task, "outputArtifactKey": "output_model_path"}


def test_the_description_has_a_line_for_every_parameter(spec):
    description = spec["pipelineInfo"]["description"]
    assert all(re.search(rf"^{p.name}.*: {re.escape(p.help)}", description, re.MULTILINE) for p in PARAMETERS)


def test_the_preflight_takes_every_parameter_and_every_other_step_one_value(spec, tasks):
    kinds = {str: "STRING", int: "NUMBER_INTEGER", float: "NUMBER_DOUBLE"}
    taken = spec["components"]["comp-preflight"]["inputDefinitions"]["parameters"]
    expected = {p.name: {"parameterType": kinds[p.type]} for p in PARAMETERS}
    assert {name: kind for name, kind in taken.items() if name != "run_id"} == expected, "edit its component.py"
    for step, key in zip(ORDER[1:], ("model_import", "dataset", "train", "evaluate"), strict=True):
        source = tasks[step]["inputs"]["parameters"]["parameters"]["taskOutputParameter"]
        assert source == {"producerTask": "preflight", "outputParameterKey": key}
        assert not {p.name for p in PARAMETERS} & tasks[step]["inputs"]["parameters"].keys()


def test_descriptions_and_docstrings_are_not_carried_by_every_step(spec):
    for component in spec["components"].values():
        assert "description" not in json.dumps(component)
    for executor in spec["deploymentSpec"]["executors"].values():
        assert '"""' not in executor["container"]["command"][-1]


def test_nothing_is_cached_by_kfp_and_nothing_fans_out(spec, tasks):
    every = [*tasks.values(), *spec["root"]["dag"]["tasks"].values()]
    assert [task for task in every if task.get("cachingOptions") or "parameterIterator" in task] == []


def test_a_step_waits_for_those_before_it(tasks):
    assert tasks.keys() == set(ORDER)
    assert (*ORDER, "clean-up") == STEPS  # what `draft-model watch` shows
    for step, others in zip(ORDER, (ORDER[:place] for place in range(len(ORDER))), strict=True):
        waits, asked = set(), {step}
        while asked:
            asked = {name for each in asked for name in tasks[each].get("dependentTasks", [])} - waits
            waits |= asked
        assert waits == set(others), step


NAMES = {parameter.name for parameter in PARAMETERS}
TEXTS = {parameter.name for parameter in PARAMETERS if parameter.type is str and not parameter.choices}


@pytest.mark.parametrize("given", [60, 200])  # bytes of each parameter that is a text
def test_the_workflow_stays_far_below_the_size_at_which_kfp_stops_reading_it(spec, given):
    """The estimate of issue A: what KFP 2.17 and Argo keep of each task; a real run came 6 % above it."""

    def text(value):
        return len(json.dumps(json.dumps(value, separators=(",", ":"))))

    def size(component):
        total = 0
        for task in component["dag"]["tasks"].values():
            inner = spec["components"][task["componentRef"]["name"]]
            total += 2 * (text(inner) + text(task)) + 6_000
            if "dag" in inner:
                total += size(inner)
                continue
            container = spec["deploymentSpec"]["executors"][inner["executorLabel"]]["container"]
            values = {}
            for name in task["inputs"]["parameters"]:
                kind = inner["inputDefinitions"]["parameters"].get(name, {}).get("parameterType")
                # A stage's parameters, as far as they are not the defaults; a URI.
                text_size = given if name in TEXTS else 12 if name in NAMES else 60
                values[name] = "x" * (20 * given if kind == "STRUCT" else text_size)
            outputs = {**inner.get("outputDefinitions", {}).get("artifacts", {})}
            uris = {name: [{"type": kind, "uri": "x" * 160, "name": name}] for name, kind in outputs.items()}
            patch = [json.dumps([values, uris]), json.dumps(inner), container["command"], container["args"]]
            total += 6 * (len(json.dumps(json.dumps(patch))) + 1_320) + 2 * text(container)
        return total

    kept = [*spec["components"].values(), spec["root"], *spec["deploymentSpec"]["executors"].values()]
    estimate = size(spec["root"]) + 2 * text(spec["root"]) + 58_000 + sum(map(text, kept))
    assert 400_000 < estimate < 600_000


def test_a_step_that_coordinates_is_started_again_as_long_as_its_job_may_run(tasks):
    assert {name for name, task in tasks.items() if "retryPolicy" in task} == set(ORDER[1:])
    (policy,) = {json.dumps(task["retryPolicy"]) for name, task in tasks.items() if name in ORDER[1:]}
    longest = sum(60 * p.default for p in PARAMETERS if p.name in ("queue_limit", "start_limit", "run_limit"))
    # Argo counts from the first attempt's start.
    assert int(json.loads(policy)["backoffMaxDuration"].removesuffix("s")) == 30 * 24 * 3600 > longest


def test_what_a_training_left_is_deleted_however_the_run_ended(spec, tasks):
    root = spec["root"]["dag"]["tasks"]
    assert root.keys() == {HANDLER, "clean-up"}
    assert root[HANDLER]["taskInfo"]["name"] == "train-a-draft-model"
    exit_task = root["clean-up"]
    assert exit_task["dependentTasks"] == [HANDLER]
    assert exit_task["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    given = exit_task["inputs"]["parameters"]
    assert given["status"] == {"taskFinalStatus": {"producerTask": HANDLER}}
    assert not any("taskOutputParameter" in source for source in given.values()), "an exit task may not"
    run_id = {"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}
    assert given["run_id"] == tasks["train-draft-model"]["inputs"]["parameters"]["run_id"] == run_id


SHOWN = {"system.Markdown", "system.HTML", "system.Metrics"}


def test_every_step_shows_something_in_the_ui(spec):
    shown = {
        name.removeprefix("comp-"): {
            kind
            for artifact in component.get("outputDefinitions", {}).get("artifacts", {}).values()
            if (kind := artifact["artifactType"]["schemaTitle"]) in SHOWN
        }
        for name, component in spec["components"].items()
        if "executorLabel" in component
    }
    assert len(shown) == len(spec["deploymentSpec"]["executors"]) == 6
    assert all(shown.values()), shown
    assert shown["import-model"] == {"system.Markdown", "system.Metrics"}
    assert shown["build-dataset"] == {"system.HTML", "system.Metrics"}
    assert shown["evaluate-draft-model"] == SHOWN


def name_of(reference, kind):
    return reference[f"{kind}Parameter"]["runtimeValue"]["constant"]


def test_a_step_gets_keys_and_places_by_optional_reference_and_no_node_of_its_own(settings):
    assert settings.keys() == {*ORDER, "clean-up"}
    for step, given in settings.items():
        keys, *hub_keys = given["secretAsEnv"]
        store, *hub_places = given["configMapAsEnv"]
        assert all(each["optional"] for each in (keys, store, *hub_keys, *hub_places))
        assert keys["secretNameParameter"]["componentInputParameter"].endswith("object_store_secret")
        assert {key["envVar"] for key in keys["keyToEnv"]} == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        variables = {key["configMapKey"]: key["envVar"] for key in store["keyToEnv"]}
        assert name_of(store, "configMapName") == "draft-model-object-store"
        assert variables == {**STORE, **{name: name for name in STORE_BY_NAME}}
        # The Hub's token and a mirror's place, for those that look into the Hub.
        asks = step not in ("train-draft-model", "clean-up")
        assert {name_of(each, "secretName") for each in hub_keys} == ({"draft-model-hub"} if asks else set())
        hub = [key["envVar"] for each in (*hub_keys, *hub_places) for key in each["keyToEnv"]]
        assert hub == (["HF_TOKEN", "HF_ENDPOINT"] if asks else [])
        # The token of the account that may manage jobs, and the run's id, by which its stages are found in MLflow.
        (volume,) = given["secretAsVolume"]
        assert (name_of(volume, "secretName"), volume["optional"]) == ("draft-model-coordinator", True)
        assert volume["mountPath"] == "/var/run/secrets/draft-model/coordinator"
        assert given["fieldPathAsEnv"] == [{"name": RUN, "fieldPath": "metadata.labels['pipeline/runid']"}]
        # A pod that no node fits waits for ever in KFP; those of the jobs end with the reason.
        assert not {"nodeSelector", "tolerations", "nodeAffinity"} & given.keys()


def images(spec):
    executors = spec["deploymentSpec"]["executors"]
    return {step.removeprefix("exec-"): executor["container"]["image"] for step, executor in executors.items()}


def test_a_step_runs_in_the_image_of_its_kind_and_installs_nothing(spec):
    kinds = {
        "dataset": ["preflight"],
        "coordinator": [*ORDER[1:], "clean-up"],
    }
    assert images(spec) == {step: IMAGES[kind] for kind, steps in kinds.items() for step in steps}
    assert len(set(IMAGES.values())) == len(IMAGES) - 1
    containers = [executor["container"] for executor in spec["deploymentSpec"]["executors"].values()]
    assert not any("pip install" in part for container in containers for part in container["command"])


def images_of_jobs(spec):
    executors = spec["deploymentSpec"]["executors"]
    given = {step.removeprefix("exec-"): executor["container"].get("env", []) for step, executor in executors.items()}
    return {step: {each["name"]: each["value"] for each in env} for step, env in given.items() if env}


def test_a_jobs_pods_run_the_image_of_their_kind(spec):
    trainer = IMAGES["trainer"]  # the engine's too, which the committed pipeline does not name
    assert images_of_jobs(spec) == {
        "import-model": {"DRAFT_MODEL_IMAGE": IMAGES["importer"]},
        "build-dataset": {"DRAFT_MODEL_IMAGE": IMAGES["dataset"], "DRAFT_MODEL_ENGINE_IMAGE": trainer},
        "train-draft-model": {"DRAFT_MODEL_IMAGE": trainer},
        "evaluate-draft-model": {"DRAFT_MODEL_IMAGE": trainer},
    }


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What `draft-model compile` writes for a cluster's own images: the IR's documents and the Kubernetes resources."""
    program, folder = Path(sysconfig.get_path("scripts")) / "draft-model", tmp_path_factory.mktemp("compiled")
    output, manifest = folder / "pipeline.yaml", folder / "resources/pipeline.yaml"
    images = ["--image=registry.example/{kind}:1", f"--image=trainer={DIGEST}", "--image=engine=vllm:1"]
    command = [program, "compile", *images, "--output", output, "--manifest", manifest]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(output), str(manifest)]
    return [load(file) for file in (output, manifest)]


def test_a_clusters_images_are_named_by_kind(given):
    (spec, _), _ = given
    assert set(images(spec).values()) == {f"registry.example/{kind}:1" for kind in ("dataset", "coordinator")}
    assert images_of_jobs(spec) == {
        "import-model": {"DRAFT_MODEL_IMAGE": "registry.example/importer:1"},
        "build-dataset": {"DRAFT_MODEL_IMAGE": "registry.example/dataset:1", "DRAFT_MODEL_ENGINE_IMAGE": "vllm:1"},
        "train-draft-model": {"DRAFT_MODEL_IMAGE": DIGEST},
        "evaluate-draft-model": {"DRAFT_MODEL_IMAGE": "vllm:1"},
    }


def test_both_files_hold_the_same_pipeline_and_the_versions_name_is_the_hash_of_what_it_holds(given):
    documents, resources = given
    version = next(resource for resource in resources if resource["kind"] == "PipelineVersion")
    assert {resource["kind"] for resource in resources} == {"Pipeline", "PipelineVersion"}
    assert [version["spec"]["pipelineSpec"], version["spec"]["platformSpec"]] == documents
    assert version["metadata"]["name"] == version["spec"]["displayName"] == version_name(documents)
    assert re.fullmatch(r"pipeline-draft-model-[0-9a-f]{12}", version_name(documents))
    assert version_name(load(COMPILED)) != version_name(documents)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["a/{kind}", "stage=b"], "allowed kinds: importer, dataset, trainer, coordinator, engine"),
        (["trainer=a", "dataset=b"], "no image for importer, coordinator"),
    ],
)
def test_kinds_that_are_unknown_or_left_out_are_told(given, told):
    assert images_by_kind([DIGEST]) == dict.fromkeys(KINDS, DIGEST)  # one image for all
    with pytest.raises(DraftModelError, match=told):
        images_by_kind(given)
