"""A KFP API server, through kfp.Client: every answer is checked, and every failure becomes a sentence.

All requests of a kfp.Client go through one ApiClient, whose `request` gets a time limit here, and raises ServerAway,
NotLetIn or DraftModelError for what goes wrong, a login page with status 200 included.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import urllib3
from kfp.client import ServiceAccountTokenVolumeCredentials

from draft_model.errors import DraftModelError
from draft_model.kubeflow import HEALTH, too_old

logger = logging.getLogger(__name__)

ENDPOINT = "KF_PIPELINES_ENDPOINT"
TIMEOUT = (10, 60)  # seconds to connect, and to wait for an answer
_PORT_FORWARD = "kubectl -n kubeflow port-forward svc/ml-pipeline-ui 8080:80"
_LOGIN = (
    "it may ask for a login (--token-file, for example of `kubectl create token default-editor --audience "
    "pipelines.kubeflow.org`, or a cookie in ~/.config/kfp/context.json), or --host lacks a path such as /pipeline"
)
_ADVICE = {
    401: f"; {_LOGIN}",
    403: "; is --namespace right, and is the token's account, or yours, a contributor of it?",
    404: "; where the server has nothing at all, --host lacks a path such as /pipeline, or KFP is older than 2.16.1",
    409: "; somebody else may have made it a moment ago: start again",
}


class ServerAway(DraftModelError):
    """A server that does not answer, or fails: it may answer later."""


class NotLetIn(DraftModelError):
    """A server that asks for a login: a new token or cookie helps."""


@dataclass(frozen=True)
class Server:
    """A KFP API server."""

    client: Any  # a kfp.Client whose methods raise DraftModelError
    host: str  # address of the API
    namespace: str = ""  # of the runs on a multi-user server

    @classmethod
    def of(cls, client: kfp.Client, namespace: str = "") -> Server:
        """Wraps a client, whose methods raise DraftModelError from then on.

        Without the user's namespace, that of the client's own settings is taken; one that does not fit is refused.
        """
        _guard(client)
        server = cls(client, client._existing_config.host)
        health = _json_of(server.get(HEALTH), server.host)
        several = health.get("multi_user")
        if told := too_old(server.host, health):
            logger.warning("%s", told)
        if namespace and not several:
            raise DraftModelError(
                f"--namespace: given {namespace!r}, but {server.host} is for a single user: leave it out"
            )
        if several and not (namespace := namespace or client.get_user_namespace()):
            raise DraftModelError(
                f"--namespace: not given, but {server.host} serves several users: name yours, of `kubectl get profiles`"
            )
        return replace(server, namespace=namespace)

    def run_link(self, run_id: str) -> str:
        """Address of a run in the UI."""
        return f"{self.client._get_url_prefix().rstrip('/')}/#/runs/details/{run_id}"

    def get(self, path: str) -> str:
        """The body of an answer that kfp.Client has no method for."""
        with _explained(self.host):
            return str(
                self.client.runs.api_client.call_api(
                    path, "GET", auth_settings=["Bearer"], _preload_content=False, _return_http_data_only=True
                ).data.decode(errors="replace")
            )


def connect(host: str = "", namespace: str = "", token_file: Path | None = None, ca_file: Path | None = None) -> Server:
    """Connects as kfp.Client does, with its environment variables and settings.

    Without a host it is the cluster of this pod or of the kubeconfig. The token's file is read for each request, so
    that a renewed one takes effect.
    """
    if problems := problems_with(host, token_file, ca_file):
        raise DraftModelError(problems)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # its retries end in our own sentence
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "only works with v2.0.0-beta.2 and later"
        credentials = ServiceAccountTokenVolumeCredentials(str(token_file)) if token_file else None
        client = _Client(host=host or None, credentials=credentials, ssl_ca_cert=str(ca_file) if ca_file else None)
    return Server.of(client, namespace)


def problems_with(host: str, token_file: Path | None, ca_file: Path | None) -> list[str]:
    """What is wrong with the options of `connect`, as far as it can be known without a request."""
    problems = []
    for option, file in (("token", token_file), ("ca", ca_file)):
        try:
            if file and not file.read_bytes().strip():
                problems.append(f"--{option}-file: {file} is empty")
        except OSError as error:
            problems.append(f"--{option}-file: {file} cannot be read: {error.strerror}")
    configs = os.environ.get("KUBECONFIG", "~/.kube/config").split(os.pathsep)
    in_cluster = os.environ.get("KUBERNETES_SERVICE_HOST") or any(Path(f).expanduser().is_file() for f in configs)
    if not (host or os.environ.get(ENDPOINT) or in_cluster):
        problems.append(
            f"--host: not given, and neither {ENDPOINT} nor a kubeconfig says where KFP is; for one in a cluster: "
            f"`{_PORT_FORWARD}`, then --host http://127.0.0.1:8080"
        )
    return problems


class _Client(kfp.Client):  # type: ignore[misc]
    """kfp's client, whose constructor asks for the server's health: five times, with a traceback each."""

    def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
        _guard(self)
        return self.healthzs.healthz_service_get_healthz()


def _guard(client: kfp.Client) -> None:
    """Wraps the request of a client's ApiClient, which all its APIs share; a second time changes nothing."""
    api, host = client.runs.api_client, client._existing_config.host
    original = api.request

    def request(method: str, url: str, **options: Any) -> Any:
        with _explained(host):
            answer = original(method, url, **{**options, "_request_timeout": TIMEOUT})
        if options.get("_preload_content", True):
            _json_of(answer.data.decode(errors="replace"), host)
        return answer

    if "request" not in vars(api):
        api.request = request


def _json_of(text: str, host: str) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(answer := json.loads(text), dict):
            return answer
    if "<" in text[:200]:
        raise NotLetIn(f"{host} answers with a web page: {_LOGIN}")
    raise ServerAway(f"{host} answers with {text[:60]!r}, which is not JSON")


@contextmanager
def _explained(host: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of the token file, which may be taken away
        raise DraftModelError(f"--token-file: {error.filename} cannot be read: {error.strerror}") from error
    except kfp_server_api.ApiException as error:
        said = f"{host} answers {error.status}: {_sentence(error.body) or error.reason or 'no reason given'}"
        away = not error.status or error.status >= 500 or error.status == 429
        kind = ServerAway if away else NotLetIn if error.status == 401 else DraftModelError
        raise kind(said + _ADVICE.get(error.status, "")) from error
    except urllib3.exceptions.HTTPError as error:
        reason = getattr(error, "reason", None) or error
        cause = str(reason).partition("): ")[2] or str(reason) or type(reason).__name__  # without urllib3's objects
        tls = isinstance(reason, urllib3.exceptions.SSLError)
        advice = (
            "--ca-file names the certificate of its authority"
            if tls
            else f"is it right, and does the port-forward run (`{_PORT_FORWARD}`)?"
        )
        raise ServerAway(
            f"--host: {host} {'is not trusted' if tls else 'does not answer'}: {cause}; {advice}"
        ) from error


def _sentence(body: str | bytes | None) -> str:
    """The server's own sentence: the gateway and the upload handler each have their own form."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    try:
        answer = json.loads(text)
        found = [part["error_message"] for part in (answer, *answer.get("details", ())) if part.get("error_message")]
        return str(found[0] if found else answer.get("message") or answer.get("error") or "")
    except (ValueError, AttributeError, TypeError):
        return "" if "<" in text else text.strip()[:300]
