"""A real API server with its etcd, for the length of a `with` block, and accounts that Roles hold back."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import yaml
from kubernetes import client, config
from kubernetes.utils import create_from_dict

from draft_model.jobs.spec import Kind

ASSETS, CRDS = "KUBEBUILDER_ASSETS", "DRAFT_MODEL_CRDS"
NAMESPACE = "team"
_READY_SECONDS = 240.0


def missing() -> str:
    """Why there can be no API server here; empty where there can."""
    assets, crds = Path(os.environ.get(ASSETS, "-")), Path(os.environ.get(CRDS, "-"))
    if not all((assets / name).exists() for name in ("etcd", "kube-apiserver")):
        return f"{ASSETS} names no folder with etcd and kube-apiserver"
    return "" if crds.is_dir() else f"{CRDS} names no folder with the operators' CRDs"


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class ApiServer:
    """An API server on 127.0.0.1, with RBAC and without controllers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._assets = Path(os.environ[ASSETS])
        self._etcd_port, self._port = free_port(), free_port()
        self._token = secrets.token_hex(16)
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ApiServer:
        (self.folder / "tokens.csv").write_text(f"{self._token},admin,admin,system:masters\n")
        subprocess.run(["openssl", "genrsa", "-out", self.folder / "sa.key", "2048"], check=True, capture_output=True)
        peer = f"http://127.0.0.1:{free_port()}"
        self._etcd = self._run(
            "etcd", f"--data-dir={self.folder}/etcd", "--unsafe-no-fsync",
            f"--listen-client-urls={self._etcd_url}", f"--advertise-client-urls={self._etcd_url}",
            f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
        )  # fmt: skip
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        self.api = client.ApiClient(self._configured(self._token))
        return self

    def __exit__(self, *_: object) -> None:
        for process in filter(None, (self._server, self._etcd)):
            process.kill()
            process.wait()

    @property
    def _etcd_url(self) -> str:
        return f"http://127.0.0.1:{self._etcd_port}"

    def _run(self, program: str, *flags: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{program}.log").open("ab") as log:
            # In a session of its own: Ctrl-C is pytest's, and a server that is starved by its clients gives up.
            return subprocess.Popen(
                [self._assets / program, *flags], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def start(self) -> None:
        """Starts the server, again after `stop`, and waits until it answers."""
        deadline = time.monotonic() + _READY_SECONDS
        while not self._ready():
            if self._server is None or self._server.poll() is not None:  # a starved one gives up after a minute
                self._launch()
            assert time.monotonic() < deadline, (self.folder / "kube-apiserver.log").read_text()[-2000:]
            time.sleep(0.2)

    def _launch(self) -> None:
        self._server = self._run(
            "kube-apiserver", f"--etcd-servers={self._etcd_url}", "--bind-address=127.0.0.1",
            f"--secure-port={self._port}", f"--cert-dir={self.folder}/certs", "--service-cluster-ip-range=10.0.0.0/24",
            "--authorization-mode=RBAC", f"--token-auth-file={self.folder}/tokens.csv",
            "--service-account-issuer=https://127.0.0.1", f"--service-account-key-file={self.folder}/sa.key",
            f"--service-account-signing-key-file={self.folder}/sa.key", "--disable-admission-plugins=ServiceAccount",
            "--endpoint-reconciler-type=none",
        )  # fmt: skip

    def stop(self) -> None:
        """Ends the server as a crash would; etcd keeps what it knew."""
        self._server.kill()
        self._server.wait()

    def _ready(self) -> bool:
        import ssl

        request = urllib.request.Request(
            f"https://127.0.0.1:{self._port}/readyz", headers={"Authorization": f"Bearer {self._token}"}
        )
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
        )
        with contextlib.suppress(OSError):
            return opener.open(request, timeout=5).status == 200
        return False

    def _configured(self, token: str) -> client.Configuration:
        found = client.Configuration()
        config.load_kube_config_from_dict(self._kubeconfig(token), client_configuration=found)
        return found

    def _kubeconfig(self, token: str) -> dict:
        cluster = {"server": f"https://127.0.0.1:{self._port}", "insecure-skip-tls-verify": True}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "it",
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it", "namespace": NAMESPACE}}],
            "clusters": [{"name": "it", "cluster": cluster}],
            "users": [{"name": "it", "user": {"token": token}}],
        }

    def kubeconfig_of_admin(self) -> Path:
        """A kubeconfig that may do everything."""
        path = self.folder / "admin.kubeconfig"
        path.write_text(yaml.safe_dump(self._kubeconfig(self._token)))
        return path

    def kubeconfig_of(self, account: str) -> Path:
        """A kubeconfig with a token of a service account, which may do what its Roles grant and no more."""
        answer = self.api.call_api(
            f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token", "POST",
            body={"spec": {"audiences": ["https://127.0.0.1"]}}, response_type="object", auth_settings=["BearerToken"],
            _return_http_data_only=True,
        )  # fmt: skip
        path = self.folder / f"{account}.kubeconfig"
        path.write_text(yaml.safe_dump(self._kubeconfig(answer["status"]["token"])))
        return path

    def create(self, *documents: dict) -> None:
        """Creates objects of built-in kinds."""
        for document in documents:
            create_from_dict(self.api, document, namespace=document["metadata"].get("namespace", NAMESPACE))

    def define(self, document: dict) -> None:
        """Creates a CustomResourceDefinition; the library's own classes would check it by rules of another version."""
        self.api.call_api(
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", "POST", body=document, response_type="object",
            auth_settings=["BearerToken"],
        )  # fmt: skip

    def define_kind(self, kind: Kind) -> None:
        """Creates the definition of a kind whose objects may hold anything."""
        names = {"kind": kind.kind, "plural": kind.plural, "singular": kind.kind.lower()}
        schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
        versions = [{"name": kind.version, "served": True, "storage": True, "schema": schema}]
        self.define(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {"name": f"{kind.plural}.{kind.group}"},
                "spec": {"group": kind.group, "names": names, "scope": "Namespaced", "versions": versions},
            }
        )


def holds(there, wanted) -> bool:
    """Whether all that is wanted is there; the server adds defaults."""
    if isinstance(wanted, dict):
        return isinstance(there, dict) and all(key in there and holds(there[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(there) == len(wanted) and all(map(holds, there, wanted))
    return there == wanted
