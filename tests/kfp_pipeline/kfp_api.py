"""A KFP API server on 127.0.0.1: v2beta1 as kfp-server-api 2.17 asks for it, v1beta1's Workflows and v1alpha1's logs.

It answers as the real one does, refusals included: errors as the gateway and the upload handler each write them, runs
whose parameters do not fit their pipeline. Tasks are Argo's nodes, drivers and executors among them, with neither a pod
nor an error (kubeflow/pipelines#14007). A run does what the test's story says, one part of it for each request.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
import uuid
import zlib
from datetime import UTC, datetime
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml

API = "/apis/v2beta1"
PAGE = "<!doctype html><title>Kubeflow</title>"
COOKIE = "session=of-the-login"
_TYPES = {"STRING": str, "NUMBER_INTEGER": int, "NUMBER_DOUBLE": (int, float)}
_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 500: 13, 503: 14}
_NEVER = "1970-01-01T00:00:00Z"


class Refused(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, sentence: str) -> None:
        self.status, self.sentence = status, sentence


class KfpApi:
    """The server.

    Attributes:
        requests: method, path and authorization header of each request.
        story: of every run: its state, and its tasks by name; a task is its state, or (state, message of the pod, log)
            and "driver" where it is the driver's.
        token: that requests must have; empty for none.
        namespaces: that callers may use; empty on a single-user server.
        pages: answers with status 200 that a gateway gives instead, by the path's end; the cookie gets past them.
        failing: status that every request gets; 0 for none.
        tag: version of the server.
        v1: whether it still has the v1beta1 API.
        ui: whether the address is the UI's, which passes on v1beta1 and v2beta1 and has a way of its own to logs.
        packed: whether Argo has packed the Workflows' status, so that tasks stay as they were.
    """

    def __init__(self, namespaces=(), tls=None) -> None:
        self.requests: list[tuple[str, str, str]] = []
        self.story: list = [("SUCCEEDED", {})]
        self.token, self.namespaces, self.failing, self.packed = "", set(namespaces), 0, False
        self.tag, self.v1, self.ui = "2.17.0", True, False
        self.pages: dict[str, str] = {}
        self.pipelines: dict[str, dict] = {}
        self.versions: dict[str, dict] = {}
        self.experiments: dict[str, dict] = {}
        self.runs: dict[str, dict] = {}
        self.recurring: dict[str, dict] = {}
        self._looks: dict[str, int] = {}
        self._tls, self._port, self._server = tls, 0, None

    @property
    def host(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    def __enter__(self) -> KfpApi:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """Listens, after a stop at the same port."""
        api = self

        class Answer(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                api.answer(self)

            do_POST = do_DELETE = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Answer)
        self._port = self._server.server_port
        if self._tls:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        url = urlsplit(request.path)
        self.requests.append((request.command, url.path, request.headers.get("Authorization", "")))
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        try:
            page = next((text for end, text in self.pages.items() if re.search(end, url.path)), None)
            if page is not None and request.headers.get("Cookie") != COOKIE:
                return self._send(request, 200, "text/html", page.encode())
            if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
                raise Refused(401, "Request header error: there is no user identity header")
            if self.failing:
                raise Refused(self.failing, "upstream connect error")
            content = self._route(request.command, url.path.removeprefix(API), query, request.headers, body)
            kind = "text/plain" if isinstance(content, str) else "application/json"
            self._send(request, 200, kind, (content if kind == "text/plain" else json.dumps(content)).encode())
        except Refused as refused:
            said = {"error_message": refused.sentence, "error_details": f"{refused.sentence}: trace"}
            if "/upload" not in url.path:
                detail = {"@type": "type.googleapis.com/api.Error", **said}
                long = f"Failed to do it: {refused.sentence}"
                said = {"error": long, "message": long, "code": _CODES[refused.status], "details": [detail]}
            self._send(request, refused.status, "application/json", json.dumps(said).encode())

    def _send(self, request, status: int, kind: str, content: bytes) -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _route(self, method: str, path: str, query: dict, headers, body: bytes):
        for verb, pattern, handle in (
            ("GET", "/healthz", self._health),
            ("GET", "/pipelines", lambda: self._list("pipelines", self.pipelines, query)),
            ("POST", "/pipelines", lambda: self._add_pipeline(json.loads(body))),
            ("POST", "/pipelines/upload_version", lambda: self._upload(query, headers, body)),
            ("GET", "/pipelines/([^/]+)/versions", lambda id: self._list_versions(id, query)),
            ("GET", "/pipelines/([^/]+)/versions/([^/]+)", lambda _, id: self._get(self.versions, id)),
            ("GET", "/experiments", lambda: self._list("experiments", self.experiments, query)),
            ("POST", "/experiments", lambda: self._add_experiment(json.loads(body))),
            ("POST", "/runs", lambda: self._add_run(json.loads(body))),
            ("GET", "/runs", lambda: self._list_of_experiment("runs", self.runs, query)),
            ("GET", "/runs/([^/:]+)", self._look),
            ("POST", "/runs/([^/:]+):terminate", self._terminate),
            ("GET", "/recurringruns", lambda: self._list_of_experiment("recurringRuns", self.recurring, query)),
            ("POST", "/recurringruns", lambda: self.add_recurring(json.loads(body))),
            ("POST", "/recurringruns/([^/:]+):(enable|disable)", self._switch),
            ("DELETE", "/recurringruns/([^/:]+)", self._delete_recurring),
            ("GET", "/apis/v1beta1/runs/([^/]+)", self._run_v1),
            ("GET", "/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log", lambda *pod: PAGE if self.ui else self._log(*pod)),
            ("GET", "/k8s/pod/logs" if self.ui else "-", lambda: self._log(query["runid"], query["podname"])),
        ):
            if verb == method and (match := re.fullmatch(pattern, path)):
                return handle(*match.groups())
        raise Refused(404, "Not Found")

    def _get(self, records: dict, id: str) -> dict:
        if id not in records:
            raise Refused(404, f"{id} not found")
        return records[id]

    def _namespace(self, given: str | None) -> str:
        if not self.namespaces:
            if given:
                raise Refused(400, "In single-user mode, namespace cannot be given")
            return ""
        if not given:
            raise Refused(400, "Namespace is empty")
        if given not in self.namespaces:
            raise Refused(403, f"User 'me' is not authorized (request: Namespace:{given}): Unauthorized access")
        return given

    def _list(self, kind: str, records: dict, query: dict) -> dict:
        namespace = self._namespace(query.get("namespace"))
        found = [r for r in records.values() if r.get("namespace", "") == namespace]
        return self._page(kind, found, query)

    def _list_versions(self, pipeline_id: str, query: dict) -> dict:
        self._get(self.pipelines, pipeline_id)
        found = [version for version in self.versions.values() if version["pipeline_id"] == pipeline_id]
        return self._page("pipeline_versions", found, query)

    def _list_of_experiment(self, kind: str, records: dict, query: dict) -> dict:
        """In pages of two."""
        found = [r for r in records.values() if r["experiment_id"] == query["experiment_id"]]
        start = int(query.get("page_token") or 0)
        page = {kind: found[start : start + 2]} if found else {}
        return page | ({"next_page_token": str(start + 2)} if found[start + 2 :] else {})

    def _page(self, kind: str, records: list, query: dict) -> dict:
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", ()):
            if predicate["operation"] not in (1, "EQUALS"):
                raise Refused(400, f"operation {predicate['operation']}")
            records = [record for record in records if record[predicate["key"]] == predicate["stringValue"]]
        if not records:
            return {}
        return {kind: records, "total_size": len(records)}

    def _add(self, kind: str, records: dict, id_name: str, record: dict) -> dict:
        """Names are unique, as in the real server's tables."""
        keys = ["display_name", "pipeline_id" if kind == "pipeline_versions" else "namespace"]
        if any(all(other.get(key) == record.get(key) for key in keys) for other in records.values()):
            raise Refused(409, f"The name {record['display_name']} already exists")
        record |= {id_name: str(uuid.uuid4()), "created_at": _now()}
        records[record[id_name]] = record
        return record

    def _add_pipeline(self, given: dict) -> dict:
        record = {**given, "namespace": self._namespace(given.get("namespace"))}
        return self._add("pipelines", self.pipelines, "pipeline_id", record)

    def _upload(self, query: dict, headers, body: bytes) -> dict:
        self._get(self.pipelines, query["pipelineid"])
        message = message_from_bytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
        part = next(
            p for p in message.get_payload() if p.get_param("name", header="content-disposition") == "uploadfile"
        )
        spec, *platform = yaml.safe_load_all(part.get_payload(decode=True))
        if not part.get_filename().endswith(".yaml") or "pipelineInfo" not in spec:
            raise Refused(400, "Failed to create a pipeline version")
        record = {
            "pipeline_id": query["pipelineid"],
            "name": query["name"],
            "display_name": query["display_name"],
            "pipeline_spec": {"pipeline_spec": spec, "platform_spec": platform[0]} if platform else spec,
        }
        return self._add("pipeline_versions", self.versions, "pipeline_version_id", record)

    def _add_experiment(self, given: dict) -> dict:
        record = {**given, "namespace": self._namespace(given.get("namespace"))}
        return self._add("experiments", self.experiments, "experiment_id", record)

    def _add_run(self, given: dict) -> dict:
        experiment = self._get(self.experiments, given["experiment_id"])
        self._check(self._spec_of(given), given.get("runtime_config", {}).get("parameters", {}))
        run = given | {"run_id": str(uuid.uuid4()), "state": "PENDING", "created_at": _now()}
        self.runs[run["run_id"]] = run | {"namespace": experiment["namespace"]}
        return run

    def _spec_of(self, run: dict) -> dict:
        reference = run.get("pipeline_version_reference")
        found = self._get(self.versions, reference["pipeline_version_id"]) if reference else run
        return found["pipeline_spec"].get("pipeline_spec", found["pipeline_spec"])

    def _check(self, spec: dict, parameters: dict) -> None:
        inputs = spec["root"]["inputDefinitions"]["parameters"]
        for name, value in parameters.items():
            if name not in inputs:
                raise Refused(400, f"parameter {name} is not an input of the pipeline")
            wanted = inputs[name]
            if not isinstance(value, _TYPES[wanted["parameterType"]]) or value not in wanted.get("literals", [value]):
                raise Refused(400, f"input parameter {name} does not fit {wanted['parameterType']}")

    def _look(self, run_id: str) -> dict:
        run = self._get(self.runs, run_id)
        if run["state"] == "CANCELING":
            run |= {"state": "FAILED", "state_history": [{"state": s} for s in ("RUNNING", "CANCELING", "FAILED")]}
            return run
        at = self._looks[run_id] = self._looks.get(run_id, -1) + 1
        state, tasks = self.story[min(at, len(self.story) - 1)]
        run |= {"state": state, "tasks": tasks}
        if not self.packed or "run_details" not in run:
            run |= {"run_details": {"task_details": [self._detail(run, n) for n in self._nodes(run).values()]}}
        return run

    def _terminate(self, run_id: str) -> dict:
        self._get(self.runs, run_id)["state"] = "CANCELING"
        return {}

    def _nodes(self, run: dict) -> dict:
        """Argo's nodes: the workflow, and of each task a driver, a graph and in it an executor."""
        wf, nodes = "pipeline-draft-model-x7k2p", {}

        def add(path: str, kind: str, template: str, phase: str, message: str = "", log: str = "") -> None:
            node = {"id": f"{wf}-{zlib.crc32(path.encode())}", "name": path, "displayName": path.rpartition(".")[2]}
            node |= {"type": kind, "templateName": template, "phase": phase, "message": message, "log": log}
            nodes[node["id"]] = node | {"startedAt": f"{run['created_at'][:-1]}.{len(nodes):03}Z"}

        add(wf, "DAG", "entrypoint", "Running")
        add(f"{wf}.root-driver", "Pod", "system-dag-driver", "Succeeded")
        for name, given in run.get("tasks", {}).items():
            state, message, log, *driver = (*given, "", "")[:4] if isinstance(given, tuple) else (given, "", "")
            phase = {"PENDING": "Pending"}.get(state, state.capitalize())
            of_driver = "driver" in driver
            outcome = phase, message, log
            path = f"{wf}.root.train.{name}(0)"
            first = outcome if of_driver else ("Succeeded",)
            add(f"{path[:-3]}-driver(0)", "Pod", "system-container-driver", *first)
            add(path, "DAG", "system-container-executor", phase)
            nodes[max(nodes, key=lambda n: nodes[n]["startedAt"])]["displayName"] = name
            if not of_driver:
                add(f"{path}.executor(0)", "Pod", "system-container-impl", *outcome)
        return nodes

    def _detail(self, run: dict, node: dict) -> dict:
        ended = node["phase"] in ("Succeeded", "Failed", "Skipped", "Canceled")
        return {
            "run_id": run["run_id"],
            "task_id": str(uuid.uuid4()),
            "display_name": node["displayName"],
            "create_time": run["created_at"],
            "start_time": node["startedAt"],
            "end_time": _now() if ended else _NEVER,
            "state": node["phase"].upper(),
            "child_tasks": [{"pod_name": node["id"]}],
        }

    def _health(self) -> dict:
        return {"multi_user": bool(self.namespaces), "apiServerTagName" if self.ui else "tag_name": self.tag}

    def _run_v1(self, run_id: str) -> dict:
        if not self.v1:
            raise Refused(404, "Not Found")
        run = self._get(self.runs, run_id)
        status: dict = {"nodes": self._nodes(run)}
        if self.packed:
            status = {"compressedNodes": base64.b64encode(gzip.compress(json.dumps(status["nodes"]).encode())).decode()}
        manifest = {"metadata": {"name": "pipeline-draft-model-x7k2p"}, "status": status}
        return {"run": {"id": run_id}, "pipeline_runtime": {"workflow_manifest": json.dumps(manifest)}}

    def _log(self, run_id: str, pod: str) -> str:
        for node in self._nodes(self._get(self.runs, run_id)).values():
            wf, _, suffix = node["id"].rpartition("-")
            if pod == f"{wf}-{node['templateName']}-{suffix}" and node["log"]:
                return node["log"]
        raise Refused(500, "Failed to read logs for run: Failed to retrieve the archived log")

    def add_recurring(self, given: dict) -> dict:
        """As the UI and the client do; names need not be unique."""
        self._get(self.experiments, given["experiment_id"])
        self._check(self._spec_of(given), given["runtime_config"]["parameters"])
        if len(given["trigger"]["cron_schedule"]["cron"].split()) != 6:
            raise Refused(400, "The cron expression is invalid")
        run = given | {"recurring_run_id": str(uuid.uuid4())}
        self.recurring[run["recurring_run_id"]] = run
        return run

    def _switch(self, id: str, word: str) -> dict:
        self._get(self.recurring, id)["mode"] = word.upper()
        return {}

    def _delete_recurring(self, id: str) -> dict:
        """Takes the runs of the schedule with it, as Kubernetes does."""
        self._get(self.recurring, id)
        del self.recurring[id]
        for run_id in [i for i, run in self.runs.items() if run.get("recurring_run_id") == id]:
            if self.runs[run_id]["state"] not in ("SUCCEEDED", "FAILED"):
                del self.runs[run_id]
        return {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
