"""The Kubernetes API as far as a training job needs it: JSON objects of one namespace, watches and logs.

The official client brings credentials, TLS and connections; the requests are plain paths. One mapping turns what the
API server answers into what a caller can act on: None (not there), `Unavailable` (ask again), or a sentence for the
user.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3
from kubernetes import client, config

from draft_model.errors import DraftModelError
from draft_model.jobs.backend import Forbidden, Unavailable
from draft_model.jobs.request import Kind, Manifest

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TIMEOUT = (5, 30)  # seconds to connect, and between two bytes
WATCH_SECONDS = 60
_LOG_SILENCE = 120  # seconds without a line after which the connection is made anew


class Gone(Exception):
    """A watch asked for a version that the API server no longer has; look at everything anew."""


class Cluster:
    """One namespace of a cluster.

    Args:
        api: connected client of the official library.
        namespace: that all objects are in.
    """

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self._api, self.namespace = api, namespace

    @classmethod
    def connect(cls) -> Cluster:
        """Connects as this pod's service account, or as KUBECONFIG says.

        Raises:
            DraftModelError: where there is neither.
        """
        configuration = client.Configuration()
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
                config.load_incluster_config(configuration)
                namespace = _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
            else:
                file = os.environ.get("KUBECONFIG")
                config.load_kube_config(file, client_configuration=configuration)
                _, active = config.list_kube_config_contexts(file)
                namespace = active["context"].get("namespace", "default")
        except (config.ConfigException, OSError) as error:
            raise DraftModelError(
                f"training_backend: no Kubernetes cluster can be reached from here ({error}): set KUBECONFIG, or use "
                "training_backend=local"
            ) from error
        if not configuration.verify_ssl:
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # what it tries again is told once, as `Unavailable`
        return cls(client.ApiClient(configuration), namespace)

    def groups(self) -> dict[str, str]:
        """The API groups that the server has, each with the version that it prefers."""
        return {group["name"]: group["preferredVersion"]["version"] for group in self._json("GET", "/apis")["groups"]}

    def has(self, kind: Kind) -> bool:
        """Whether the server has a kind of objects."""
        try:
            resources = self._json("GET", f"/apis/{kind.group}/{kind.version}")["resources"]
        except client.ApiException:
            return False
        return any(resource["name"] == kind.plural for resource in resources)

    def may(self, verb: str, group: str, resource: str) -> bool:
        """Whether this service account may do that in the namespace; `pods/log` is pods with the part `log`."""
        name, _, part = resource.partition("/")
        asked = {"namespace": self.namespace, "verb": verb, "group": group, "resource": name, "subresource": part}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        return bool(self._json("POST", path, body=review)["status"]["allowed"])

    def create(self, kind: Kind, manifest: Manifest) -> Manifest | None:
        """Creates an object; None where one of that name exists."""
        try:
            return self._json("POST", self._path(kind), body=manifest)
        except client.ApiException as error:
            if error.status == 409:
                return None
            raise self._refused(error, f"create {kind.plural}", manifest["metadata"]["name"]) from None

    def get(self, kind: Kind, name: str) -> Manifest | None:
        """An object, or None where there is none of that name."""
        return self._get(f"{self._path(kind)}/{name}", f"get {kind.plural}", name)

    def pod(self, name: str) -> Manifest | None:
        """A pod, or None."""
        return self._get(f"{self._core('pods')}/{name}", "get pods", name)

    def config_map(self, name: str) -> dict[str, str] | None:
        """The data of a ConfigMap, or None where there is none of that name."""
        found = self._get(f"{self._core('configmaps')}/{name}", "get configmaps", name)
        return None if found is None else found.get("data") or {}

    def objects(self, kind: Kind, selector: str = "") -> list[Manifest]:
        """Objects by label selector."""
        query = {"labelSelector": selector} if selector else {}
        return list(self._listed(self._path(kind), query, f"list {kind.plural}")["items"])

    def pods(self, selector: str) -> list[Manifest]:
        """Pods by label selector."""
        return list(self._listed(self._core("pods"), {"labelSelector": selector}, "list pods")["items"])

    def warnings(self) -> list[Manifest]:
        """The namespace's warning events."""
        return list(self._listed(self._core("events"), {"fieldSelector": "type=Warning"}, "list events")["items"])

    def delete(self, kind: Kind, name: str) -> None:
        """Deletes an object and what it owns; that there is none is no error."""
        try:
            self._json("DELETE", f"{self._path(kind)}/{name}", {"propagationPolicy": "Background"})
        except client.ApiException as error:
            if not _not_found(error, name):
                raise self._refused(error, f"delete {kind.plural}", name) from None

    def watch(self, kind: Kind, name: str, version: str) -> Iterator[str]:
        """Follows one object's changes for a while.

        Args:
            kind: of the object.
            name: of the object.
            version: resource version to go on from; empty for now.

        Yields:
            The resource version after each change, so that a next watch can go on from there.

        Raises:
            Gone: where the version is too old.
            Unavailable: when the connection breaks.
        """
        query = {"fieldSelector": f"metadata.name={name}"}
        if not version:
            version = self._listed(self._path(kind), query, f"list {kind.plural}")["metadata"]["resourceVersion"]
            yield version
        query |= {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS),
            "resourceVersion": version,
        }
        for line in self._lines(self._path(kind), query, WATCH_SECONDS + 15, f"watch {kind.plural}"):
            event = json.loads(line)
            if event["type"] == "ERROR":
                if event["object"].get("code") == 410:
                    raise Gone
                raise Unavailable(str(event["object"].get("message")))
            yield event["object"]["metadata"]["resourceVersion"]

    def log(self, pod: str, container: str, since: str) -> Iterator[str]:
        """Lines of a container's log, each after its time, until the container ends.

        Raises:
            Unavailable: when the connection breaks; go on from the last line's time.
        """
        query = {"container": container, "follow": "true", "timestamps": "true"} | (
            {"sinceTime": since} if since else {}
        )
        yield from self._lines(f"{self._core('pods')}/{pod}/log", query, _LOG_SILENCE, "get pods/log")

    def _core(self, resource: str) -> str:
        return f"/api/v1/namespaces/{self.namespace}/{resource}"

    def _path(self, kind: Kind) -> str:
        return f"/apis/{kind.group}/{kind.version}/namespaces/{self.namespace}/{kind.plural}"

    def _get(self, path: str, verb: str, name: str) -> Manifest | None:
        try:
            return self._json("GET", path)
        except client.ApiException as error:
            if _not_found(error, name):
                return None
            raise self._refused(error, verb, name) from None

    def _listed(self, path: str, query: Mapping[str, str], verb: str) -> Manifest:
        try:
            return self._json("GET", path, query)
        except client.ApiException as error:
            raise self._refused(error, verb, "") from None

    def _json(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Manifest | None = None
    ) -> Manifest:
        response = self._send(method, path, query or {}, _TIMEOUT, body)
        try:
            return dict(json.loads(response.data))
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise Unavailable(str(error)) from error

    def _lines(self, path: str, query: Mapping[str, str], silence: float, verb: str) -> Iterator[str]:
        try:
            response = self._send("GET", path, query, (_TIMEOUT[0], silence), None)
        except client.ApiException as error:
            raise self._refused(error, verb, "") from None
        try:
            for line in response:
                yield line.decode(errors="replace").rstrip("\n")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unavailable(str(error)) from error
        finally:
            response.close()

    def _send(
        self, method: str, path: str, query: Mapping[str, str], timeout: tuple[float, float], body: Manifest | None
    ) -> Any:
        try:
            return self._api.call_api(
                path + (f"?{urlencode(query)}" if query else ""), method,
                header_params={"Accept": "application/json, */*", "Content-Type": "application/json"}, body=body,
                auth_settings=["BearerToken"], _preload_content=False, _return_http_data_only=True,
                _request_timeout=timeout,
            )  # fmt: skip
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unavailable(str(getattr(error, "reason", error))) from error

    def _refused(self, error: client.ApiException, verb: str, name: str) -> Exception:
        """What an answer that nobody expected means."""
        said = _status(error).get("message") or str(error.body or error.reason)
        if error.status == 403:
            return Forbidden(
                f"Kubernetes does not let this service account {verb} in namespace {self.namespace}: {said} "
                "(manifests/base has the Role that it needs)"
            )
        if error.status in (400, 422):
            return DraftModelError(f"Kubernetes refuses to {verb} {name}: {said}")
        # 404 without a name: a server that has just been started does not know its custom resources yet.
        return Unavailable(f"{error.status} {said}")


def _status(error: client.ApiException) -> Manifest:
    try:
        found = json.loads(error.body)
        return found if isinstance(found, dict) else {}
    except (TypeError, ValueError):
        return {}


def _not_found(error: client.ApiException, name: str) -> bool:
    """Whether just this object is not there; a path that the server does not serve (yet) is something else."""
    status = _status(error)
    return error.status == 404 and status.get("reason") == "NotFound" and status.get("details", {}).get("name") == name
