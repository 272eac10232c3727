"""KFP 2.17's launcher, as far as a component meets it: executor input, the compiled command, rules for the output.

Read in backend/src/v2 of KFP 2.17.0 (component/launcher_v2.go, driver, metadata/converter.go). What the launcher mounts
at /minio is a folder of the test here. A component's process is forked from one that has imported the libraries;
test_local_run.py starts the components' own commands.
"""

import json
import math
import multiprocessing
import os
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from training.processes import start

TYPES = {"STRING": str, "STRUCT": dict, "LIST": list, "NUMBER_INTEGER": int, "NUMBER_DOUBLE": float}


@cache
def spec():
    """The compiled pipeline."""
    import yaml

    from kfp_pipeline.compile import COMPILED  # takes seconds, which no component's process has to spend

    return next(yaml.load_all(COMPILED.read_text(encoding="utf-8"), yaml.CSafeLoader))


def execute(environment, mount, program, arguments):
    """What the command of a component does, in a process of its own."""
    from kfp.dsl import executor_main
    from kfp.dsl.types import artifact_types

    os.environ.update(environment)
    # The data set's workers come from this process, which has all loaded, instead of a server that loads it again.
    contexts = multiprocessing.context._concrete_contexts
    contexts["forkserver"] = contexts["fork"]
    artifact_types._MINIO_LOCAL_MOUNT_PREFIX = f"{mount}/"
    sys.argv = ["executor_main", "--component_module_path", str(program), *arguments]
    executor_main.executor_main()


@dataclass
class Launcher:
    """Runs components of the compiled file one after another, as the pods of one run."""

    folder: Path
    root: str  # the run's: <pipeline root>/<pipeline name>/<run id>
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, name, **parameters):
        """Runs one component; its inputs are numbers as protobuf has them, which knows doubles only."""
        component = spec()["components"][f"comp-{name}"]
        folder = self.folder / name
        mount, outputs = folder / "minio", component.get("outputDefinitions", {})
        folder.mkdir(parents=True, exist_ok=True)
        artifacts = {
            key: {
                "name": key,
                "type": kind["artifactType"],
                "uri": f"{self.root}/{name}/5b1b4bd4-0000-4000-8000-000000000000/{key}",
                "metadata": {"display_name": key},
            }
            for key, kind in outputs.get("artifacts", {}).items()
        }
        given = json.loads(json.dumps(parameters), parse_int=float)
        assert given.keys() == component["inputDefinitions"]["parameters"].keys()
        executor_input = {
            "inputs": {"parameterValues": given},
            "outputs": {
                "parameters": {
                    key: {"outputFile": str(folder / "outputs" / key)} for key in outputs.get("parameters", {})
                },
                "artifacts": {key: {"artifacts": [artifact]} for key, artifact in artifacts.items()},
                "outputFile": str(folder / "executor_output.json"),
            },
        }
        container = spec()["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        arguments = [json.dumps(executor_input) if argument == "{{$}}" else argument for argument in container["args"]]
        program, log = folder / "ephemeral_component.py", folder / "log"
        program.write_text(container["command"][-1])
        environment = {**os.environ, **self.environment, "TMPDIR": str(folder)}
        process = start(execute, environment, mount, program, arguments, log=log)
        process.join()
        done = SimpleNamespace(args=arguments, returncode=process.exitcode, stderr=log.read_text(errors="replace"))
        return Ended(component, self.root, mount, done, folder / "executor_output.json")


@dataclass
class Ended:
    """A component that has ended."""

    component: dict
    root: str
    mount: Path
    process: SimpleNamespace
    file: Path

    def accepted(self):
        """The output parameters, where the launcher and what comes after it take the executor's output."""
        assert self.process.returncode == 0, self.process.stderr[-4000:]
        text = self.file.read_text()
        output = json.loads(text, parse_constant=lambda word: self._refuse(f"{word} is no JSON"))
        declared = self.component.get("outputDefinitions", {})
        values = output.get("parameterValues", {})
        kinds = {key: kind["parameterType"] for key, kind in declared.get("parameters", {}).items()}
        assert values.keys() == kinds.keys()
        for key, value in values.items():
            assert isinstance(value, TYPES[kinds[key]]), f"{key}: {value!r} is no {kinds[key]}"
        assert output.get("artifacts", {}).keys() == declared.get("artifacts", {}).keys()
        for key, (artifact,) in ((key, each["artifacts"]) for key, each in output.get("artifacts", {}).items()):
            assert artifact["uri"].startswith(f"{self.root}/"), f"{key}: {artifact['uri']} has no expected prefix"
            self._storable(artifact["metadata"])
        self._storable(values)
        return values

    def metadata(self, artifact):
        """Metadata of an output artifact; of Metrics, its numbers."""
        return json.loads(self.file.read_text())["artifacts"][artifact]["artifacts"][0]["metadata"]

    def uploaded(self, artifact):
        """What the launcher uploads of an artifact: a file's text, or those of a folder's files; None for nothing."""
        uri = f"{self.root}/{self.process.args[-1].replace('_', '-')}"
        path = next((self.mount / uri.removeprefix("minio://")).glob(f"*/{artifact}"), None)
        if path is None or path.is_file():
            return path and path.read_text(encoding="utf-8")
        return {file.name: file.read_text(encoding="utf-8") for file in path.iterdir()}

    def _storable(self, value):
        """Only these become MLMD properties: no null, no NaN."""
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
        assert isinstance(value, str | bool | int | float | list | dict), f"{value!r} cannot be stored"
        assert not isinstance(value, float) or math.isfinite(value)
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            self._storable(each)

    @staticmethod
    def _refuse(why):
        raise AssertionError(why)
