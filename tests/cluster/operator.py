"""What plays training-operator and the kubelet in tests: pods whose processes are real ones on this machine.

For each PyTorchJob it makes the pods that the operator would make, starts their commands with the PET_* variables that
it would set, and reports pods and job as kubelet and operator would. Logs come through the API server, as in life.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from base64 import b64decode
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from answers import certified
from kubernetes import client

from cluster.apiserver import NAMESPACE, ApiServer, free_port
from draft_model.jobs.spec import WORK

NODE = "node-1"
_ROUND_SECONDS = 0.15
_GROUP = ("kubeflow.org", "v1", NAMESPACE, "pytorchjobs")


def now(digits: int = 0) -> str:
    """The time as Kubernetes writes it."""
    moment = datetime.now(UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S") + (f".{moment.microsecond * 1000:09d}" if digits else "") + "Z"


@dataclass
class Container:
    """A pod's process."""

    pod: dict
    folder: Path  # its /tmp
    process: subprocess.Popen
    reader: threading.Thread
    reported: bool = False

    @property
    def log(self) -> Path:
        return self.folder / "container.log"

    @property
    def ended(self) -> int | None:
        """Its exit code as Kubernetes counts; None while it runs."""
        code = self.process.poll()
        if code is None or self.reader.is_alive():
            return None
        return code if code >= 0 else 128 - code

    def end(self) -> None:
        """As the kubelet ends a pod."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


@dataclass
class Operator:
    """Runs PyTorchJobs of one API server, until it is closed."""

    server: ApiServer
    folder: Path  # for the pods' files
    programs: dict[str, list[str]] = field(default_factory=dict)  # instead of the pods' own, by the run's id
    started: dict[str, int] = field(default_factory=dict)  # how often, by the pod's name
    containers: dict[str, Container] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Operator:
        self._api = client.CustomObjectsApi(self.server.api)
        self._core = client.CoreV1Api(self.server.api)
        self._kubelet = Kubelet(self)
        self.server.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._kubelet.port}},
        }
        self._core.patch_node_status(NODE, {"status": status})
        self._closed = threading.Event()
        # One thread starts all processes: some of them end with the thread that started them.
        self._thread = threading.Thread(target=self._run, name="operator", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        for container in self.containers.values():
            if container.process.poll() is None:
                os.killpg(container.process.pid, signal.SIGKILL)
            container.process.wait()
        self._kubelet.close()

    def of_job(self, name: str) -> list[Container]:
        """The containers of a job's pods that exist."""
        return [c for pod, c in self.containers.items() if pod.startswith(f"{name}-")]

    def _run(self) -> None:
        while not self._closed.wait(_ROUND_SECONDS):
            try:
                jobs = {
                    job["metadata"]["name"]: job for job in self._api.list_namespaced_custom_object(*_GROUP)["items"]
                }
                for pod, container in list(self.containers.items()):
                    if container.pod["metadata"]["labels"]["training.kubeflow.org/job-name"] not in jobs:
                        self._remove(pod)
                for job in jobs.values():
                    self._reconcile(job)
            except Exception as error:  # the API server is being restarted; a real operator asks again, too
                print(f"operator: {error}"[-700:], flush=True)

    def _reconcile(self, job: dict) -> None:
        name = job["metadata"]["name"]
        conditions = {c["type"] for c in job.get("status", {}).get("conditions", ()) if c["status"] == "True"}
        if conditions & {"Succeeded", "Failed"}:
            for container in self.of_job(name):  # the kubelet's reports do not end with the operator's
                self._report_pod(container)
            return
        if job["spec"]["runPolicy"].get("suspend"):
            for pod in [pod for pod in self.containers if pod.startswith(f"{name}-")]:
                self._remove(pod)
            self._report(job, "Suspended", f"PyTorchJob {name} is suspended.", {})
            return
        specs = job["spec"]["pytorchReplicaSpecs"]
        for kind, replica in specs.items():
            for index in range(replica["replicas"]):
                if f"{name}-{kind.lower()}-{index}" not in self.containers:
                    self._make(job, kind, index)
        counts = {kind: {"active": 0, "succeeded": 0, "failed": 0} for kind in specs}
        for kind, count in counts.items():
            for index in range(specs[kind]["replicas"]):
                container = self.containers[f"{name}-{kind.lower()}-{index}"]
                self._report_pod(container)
                code = container.ended
                count["active" if code is None else "failed" if code else "succeeded"] += 1
        first = counts.get("Master", counts.get("Worker"))
        failed = {kind: count["failed"] for kind, count in counts.items() if count["failed"]}
        if failed:
            words = ", ".join(f"{number} {kind}" for kind, number in failed.items())
            self._report(job, "Failed", f"PyTorchJob {name} is failed because {words} replica(s) failed.", counts)
        elif first["succeeded"]:
            self._report(job, "Succeeded", f"PyTorchJob {name} is successfully completed.", counts)
        else:
            self._report(job, "Running", f"PyTorchJob {name} is running.", counts)

    def _report(self, job: dict, kind: str, message: str, counts: dict) -> None:
        """Conditions exclude one another, as the operator keeps them; `Created` stays."""
        old = job.get("status", {})
        conditions = [{"type": "Created", "status": "True", "reason": "PyTorchJobCreated", "message": "created"}]
        if kind in ("Failed", "Succeeded"):
            conditions.append({"type": "Running", "status": "False", "reason": "PyTorchJobRunning", "message": "ran"})
        conditions.append({"type": kind, "status": "True", "reason": f"PyTorchJob{kind}", "message": message})
        status = {"conditions": conditions, "replicaStatuses": counts}
        if {key: old.get(key) for key in status} != status:
            self._api.replace_namespaced_custom_object_status(
                *_GROUP, job["metadata"]["name"], {**job, "status": status}
            )

    def _make(self, job: dict, kind: str, index: int) -> None:
        name, total = job["metadata"]["name"], sum(r["replicas"] for r in job["spec"]["pytorchReplicaSpecs"].values())
        template = copy.deepcopy(job["spec"]["pytorchReplicaSpecs"][kind]["template"])
        (container,) = template["spec"]["containers"]
        assert container["name"] == "pytorch"
        port = self.ports.setdefault(job["metadata"]["uid"], free_port())
        rank = index + (kind == "Worker" and "Master" in job["spec"]["pytorchReplicaSpecs"])
        injected = {
            "PET_NNODES": str(total), "PET_NPROC_PER_NODE": job["spec"]["nprocPerNode"], "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": f"{name}-master-0", "PET_MASTER_PORT": str(port),
        }  # fmt: skip
        container["env"] += [{"name": key, "value": value} for key, value in injected.items()]
        template["metadata"]["labels"] |= {
            "training.kubeflow.org/job-name": name,
            "training.kubeflow.org/replica-type": kind.lower(),
            "training.kubeflow.org/replica-index": str(index),
        }
        owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": name, "uid": job["metadata"]["uid"]}
        pod = {
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": f"{name}-{kind.lower()}-{index}",
                **template["metadata"],
                "ownerReferences": [{**owner, "controller": True}],
            },
            "spec": {**template["spec"], "nodeName": NODE},
        }  # fmt: skip
        created = self._core.create_namespaced_pod(NAMESPACE, pod)
        pod["metadata"]["uid"] = created.metadata.uid
        self._start(pod, job["metadata"]["labels"]["draft-model/run-id"])

    def _start(self, pod: dict, run_id: str) -> None:
        name, (container,) = pod["metadata"]["name"], pod["spec"]["containers"]
        folder = self.folder / f"{name}-{self.started.get(name, 0)}"
        folder.mkdir(parents=True)
        own = {variable["name"]: self._value(variable) for variable in container["env"]}
        # What a container has to itself is a folder here: its scratch folder, its termination log, its peers' names.
        places = {WORK: str(folder / "work"), "/dev/termination-log": str(folder / "termination-log")}
        for place, here in places.items():
            own = {key: None if value is None else value.replace(place, here) for key, value in own.items()}
        own |= {"PET_MASTER_ADDR": "127.0.0.1", "HOME": str(folder)}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "DRAFT_MODEL_", "KUBE"))}
        environment = {**kept, **{key: value for key, value in own.items() if value is not None}, "TMPDIR": str(folder)}
        command = self.programs.get(run_id) or [sys.executable, *container["command"][1:]]
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        reader = threading.Thread(target=_copy, args=(process, folder / "container.log"), daemon=True)
        reader.start()
        self.started[name] = self.started.get(name, 0) + 1
        self.containers[name] = Container(pod, folder, process, reader)
        self._status(name, "Running", {"running": {"startedAt": now()}})

    def _value(self, variable: dict) -> str | None:
        if "value" in variable:
            return variable["value"]
        reference = variable["valueFrom"]["secretKeyRef"]
        try:
            secret = self._core.read_namespaced_secret(reference["name"], NAMESPACE)
        except client.ApiException as error:
            if error.status == 404 and reference.get("optional"):
                return None
            raise
        return b64decode(secret.data[reference["key"]]).decode()

    def _report_pod(self, container: Container) -> None:
        code = container.ended
        if code is None or container.reported:
            return
        message = container.folder / "termination-log"
        ended = {
            "exitCode": code, "reason": "Error" if code else "Completed", "startedAt": now(), "finishedAt": now(),
            "message": message.read_text() if message.exists() else "",
        }  # fmt: skip
        self._status(container.pod["metadata"]["name"], "Failed" if code else "Succeeded", {"terminated": ended})
        container.reported = True

    def _status(self, pod: str, phase: str, state: dict) -> None:
        container = {"name": "pytorch", "state": state, "ready": "running" in state, "restartCount": 0, "image": "",
                     "imageID": ""}  # fmt: skip
        self._core.patch_namespaced_pod_status(
            pod, NAMESPACE, {"status": {"phase": phase, "containerStatuses": [container]}}
        )

    def _remove(self, pod: str) -> None:
        """Asks the container to end; the pod is there until it has."""
        container = self.containers[pod]
        container.end()
        if container.ended is None:
            return
        try:
            self._core.delete_namespaced_pod(pod, NAMESPACE, grace_period_seconds=0)
        except client.ApiException as error:
            if error.status != 404:
                raise
        del self.containers[pod]


def _copy(process: subprocess.Popen, log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(f"{now(9)} {line.rstrip(chr(10))}\n")
            file.flush()


class Kubelet:
    """Serves the containers' logs to the API server."""

    def __init__(self, operator: Operator) -> None:
        folder = operator.folder
        folder.mkdir(exist_ok=True, parents=True)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
                container = operator.containers.get(path.path.split("/")[3])
                self.send_response(200 if container else 404)
                self.end_headers()
                if container:
                    with suppress(OSError):  # whoever read the log has gone
                        self._send(container, query)

            def _send(self, container: Container, query: dict) -> None:
                with container.log.open(encoding="utf-8") as file:
                    while True:
                        ended = container.ended is not None
                        for line in file:
                            self.wfile.write(line.encode())
                        if ended or "follow" not in query:
                            return
                        self.wfile.flush()
                        time.sleep(0.1)

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.socket = certified(folder, NODE).wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
