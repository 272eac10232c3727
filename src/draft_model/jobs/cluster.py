"""One namespace of a Kubernetes cluster, by the official client, with objects as JSON.

A call gives an answer, None (no such object), `Unavailable` (ask again), or a sentence for the user: no error of the
API server is taken for a missing or failed job.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import urllib3
from kubernetes import client, config, watch
from kubernetes.config.incluster_config import InClusterConfigLoader

from draft_model.errors import DraftModelError, StoreUnavailable
from draft_model.jobs.spec import Kind, Manifest

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 2.0
_AWAY_SECONDS = 15 * 60.0  # that an object store or an API server may be away
_POD_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ACCOUNT = Path("/var/run/secrets/draft-model/coordinator")
"""Where a step that manages jobs has the token of the account that may; other steps have their pod's own account."""
_TIMEOUT = (5, 30)  # seconds to connect, and between two bytes
_LOG_SILENCE = 120  # seconds without a line after which the connection is made anew
_CLOCK_SKEW = 60  # seconds
Answer = TypeVar("Answer")


class Unavailable(DraftModelError):
    """The API server does not answer now, or not sensibly; the same question may be asked again."""


class Forbidden(DraftModelError):
    """The service account lacks a right; for some seconds after its start an API server says so of everything."""


def patiently(
    ask: Callable[[], Answer], seconds: float = _AWAY_SECONDS, forbidden: float = -1.0,
    clock: Callable[[], float] = time.monotonic,
) -> Answer:  # fmt: skip
    """Asks an object store or an API server again while it is away, and for so many seconds while it forbids."""
    started, refused, told = clock(), math.inf, False
    while True:
        try:
            answer = ask()
        except (StoreUnavailable, Unavailable, Forbidden) as error:
            now = clock()
            refused = min(refused, now) if isinstance(error, Forbidden) else math.inf
            if now - refused > forbidden:
                raise
            if now - started > seconds:
                raise DraftModelError(f"no answer for {seconds / 60:.0f} minutes: {error}") from error
            if not told:
                logger.warning("%s: asking again", error)
            told = True
            time.sleep(AGAIN_SECONDS)
        else:
            if told:
                logger.info("the server answers again")
            return answer


class Cluster:
    """One namespace of a cluster, by a connected client."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.namespace = namespace
        self._custom, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self._apis, self._authorization = client.ApisApi(api), client.AuthorizationV1Api(api)

    @classmethod
    def connect(cls) -> Cluster:
        """Connects as KUBECONFIG says, or as a service account: the coordinator's where its token is mounted."""
        configuration = client.Configuration()
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
                account = ACCOUNT if (ACCOUNT / "token").exists() else _POD_ACCOUNT
                InClusterConfigLoader(str(account / "token"), str(account / "ca.crt")).load_and_set(configuration)
                namespace = (account / "namespace").read_text(encoding="utf-8").strip()
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
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries are reported once, as `Unavailable`
        return cls(client.ApiClient(configuration), namespace)

    def groups(self) -> dict[str, str]:
        """The server's API groups, each with its preferred version."""
        found = self._call("list API groups", "", self._apis.get_api_versions) or {}
        return {group["name"]: group["preferredVersion"]["version"] for group in found.get("groups") or ()}

    def has(self, kind: Kind) -> bool:
        """Whether the server has a kind of objects."""
        if kind.group not in self.groups():
            return False
        resources = self._custom.get_api_resources
        try:
            found = self._call(f"list resources of {kind.group}", "", resources, kind.group, kind.version)
        except Unavailable as error:
            if "(404 " in str(error):  # the group, in other versions only
                return False
            raise
        return any(resource["name"] == kind.plural for resource in (found or {}).get("resources") or ())

    def may(self, verb: str, group: str, resource: str) -> bool:
        """Whether this account may do that in the namespace; `pods/log` is the subresource `log` of pods."""
        name, _, part = resource.partition("/")
        asked = {"namespace": self.namespace, "verb": verb, "group": group, "resource": name, "subresource": part}
        create = self._authorization.create_self_subject_access_review
        found = self._call("create access reviews", "", create, {"spec": {"resourceAttributes": asked}})
        return bool((found or {})["status"]["allowed"])

    def create(self, kind: Kind, manifest: Manifest) -> Manifest | None:
        """Creates an object; None where one of that name exists."""
        create, name = self._custom.create_namespaced_custom_object, manifest["metadata"]["name"]
        return self._call(f"create {kind.plural}", name, create, *self._of(kind), manifest)

    def get(self, kind: Kind, name: str) -> Manifest | None:
        """An object, or None."""
        get = self._custom.get_namespaced_custom_object
        return self._call(f"get {kind.plural}", name, get, *self._of(kind), name)

    def objects(self, kind: Kind, selector: str = "") -> list[Manifest]:
        """Objects by label selector."""
        find = self._custom.list_namespaced_custom_object
        return self._items(f"list {kind.plural}", find, *self._of(kind), label_selector=selector)

    def delete(self, kind: Kind, name: str) -> None:
        """Deletes an object and what it owns; that there is none is no error."""
        delete = self._custom.delete_namespaced_custom_object
        self._call(f"delete {kind.plural}", name, delete, *self._of(kind), name, propagation_policy="Background")

    def pod(self, name: str) -> Manifest | None:
        """A pod, or None."""
        return self._call("get pods", name, self._core.read_namespaced_pod, name, self.namespace)

    def pods(self, selector: str) -> list[Manifest]:
        """Pods by label selector."""
        return self._items("list pods", self._core.list_namespaced_pod, self.namespace, label_selector=selector)

    def has_node(self, selector: str) -> bool:
        """Whether the cluster has a node of these labels; a right that no Role of one namespace gives."""
        return bool(self._items("list nodes", self._core.list_node, label_selector=selector))

    def config_map(self, name: str) -> dict[str, str] | None:
        """The data of a ConfigMap, or None."""
        found = self._call("get configmaps", name, self._core.read_namespaced_config_map, name, self.namespace)
        return None if found is None else found.get("data") or {}

    def warnings(self) -> list[Manifest]:
        """The namespace's warning events."""
        find = self._core.list_namespaced_event
        return self._items("list events", find, self.namespace, field_selector="type=Warning")

    def wait(self, kind: Kind, name: str, version: str, seconds: int) -> None:
        """Returns when an object is of another version, or after some seconds."""
        stream = watch.Watch().stream(
            self._custom.list_namespaced_custom_object, *self._of(kind), field_selector=f"metadata.name={name}",
            resource_version=version, timeout_seconds=seconds, _request_timeout=(_TIMEOUT[0], seconds + 15),
        )  # fmt: skip
        next(self._streamed(f"watch {kind.plural}", stream), None)

    def log(self, pod: str, container: str, since: str) -> Iterator[tuple[str, str]]:
        """Time and text of each line that a container writes after a time, until it ends."""
        limit = {}
        if since:
            age = datetime.now(UTC) - datetime.fromisoformat(since[:19] + "+00:00")
            limit = {"since_seconds": max(1, math.ceil(age.total_seconds()) + _CLOCK_SKEW)}
        stream = watch.Watch().stream(
            self._core.read_namespaced_pod_log, pod, self.namespace, container=container, timestamps=True,
            _request_timeout=(_TIMEOUT[0], _LOG_SILENCE), **limit,
        )  # fmt: skip
        for line in self._streamed("get pods/log", stream):
            moment, _, text = line.partition(" ")
            if moment > since:
                yield moment, text

    def _of(self, kind: Kind) -> tuple[str, str, str, str]:
        return kind.group, kind.version, self.namespace, kind.plural

    def _items(self, verb: str, method: Callable[..., Any], /, *args: str, **query: str) -> list[Manifest]:
        return list((self._call(verb, "", method, *args, **query) or {}).get("items") or ())

    def _call(self, verb: str, name: str, method: Callable[..., Any], /, *args: Any, **more: Any) -> Manifest | None:
        """The answer as JSON; None where the object named is missing, or exists already and was to be created."""
        try:
            response = method(*args, **more, _preload_content=False, _request_timeout=_TIMEOUT)
            answer = json.loads(response.data)
            if not isinstance(answer, dict) or "kind" not in answer:  # of a proxy before the API server
                raise ValueError(f"{response.data[:60]!r} is no answer of Kubernetes")
            return answer
        except client.ApiException as error:
            status = _status(error)
            missing = status.get("reason") == "NotFound" and status.get("details", {}).get("name") == name
            if name and ((error.status == 404 and missing) or (error.status == 409 and verb.startswith("create "))):
                return None
            raise self._refused(error, verb, name) from None
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise Unavailable(f"the API server does not answer ({getattr(error, 'reason', error)})") from error

    def _streamed(self, verb: str, stream: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from stream
        except client.ApiException as error:
            raise self._refused(error, verb, "") from None
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise Unavailable(f"the API server does not answer ({error})") from error

    def _refused(self, error: client.ApiException, verb: str, name: str) -> Exception:
        said = _status(error).get("message") or str(error.body or error.reason)
        if error.status == 403:
            return Forbidden(
                f"Kubernetes does not let this service account {verb} in namespace {self.namespace}: {said} "
                "(manifests/base has the Role that it needs)"
            )
        if error.status in (400, 422):
            return DraftModelError(f"Kubernetes refuses to {verb} {name}: {said}")
        # 404 without a name: a server that has just been started does not know its custom resources yet.
        return Unavailable(f"the API server does not answer ({error.status} {said})")


def _status(error: client.ApiException) -> Manifest:
    with suppress(TypeError, ValueError):
        if isinstance(found := json.loads(error.body), dict):
            return found
    return {}
