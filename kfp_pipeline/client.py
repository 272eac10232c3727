"""A KFP API server as `draft-model submit` meets it: who may talk to it, and what its refusals mean.

All calls go through kfp.Client's generated API (`client.runs`, `client.pipelines`, ...): unlike its own methods, these
take a time limit, so that a connection that nobody answers any more does not hold a CI job for ever.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import urllib3

from draft_model.errors import DraftModelError

ENDPOINT = "KF_PIPELINES_ENDPOINT"
TIMEOUT = (10, 60)
"""Seconds to connect, and to wait for an answer."""
_EQUALS = 1  # as kfp.Client writes the operation

_PORT_FORWARD = "kubectl -n kubeflow port-forward svc/ml-pipeline-ui 8080:80"
_TOKEN = "kubectl create token default-editor --audience pipelines.kubeflow.org"  # noqa: S105


class ServerAway(DraftModelError):
    """A server that does not answer, or fails: it may answer later."""


class NotLetIn(DraftModelError):
    """A server that does not know who asks: it may after a new token."""


@dataclass(frozen=True)
class Server:
    """A KFP API server.

    Attributes:
        client: speaks with it.
        ui: address that links begin with.
        namespace: whose runs are meant on a server of several users; empty on one of a single user.
    """

    client: Any
    ui: str
    namespace: str = ""

    @classmethod
    def of(cls, client: kfp.Client, namespace: str = "") -> Server:
        """The server that a client speaks with.

        Args:
            client: made with whatever the server asks for.
            namespace: of the user; empty: that of the client's own settings.

        Raises:
            DraftModelError: where the server does not answer or does not let in, or the namespace does not fit.
        """
        server = cls(client, client._get_url_prefix())
        host = server.host
        with server.asked():
            answer = client.healthzs.healthz_service_get_healthz(_preload_content=False, _request_timeout=TIMEOUT)
        try:
            several = bool(json.loads(answer.data).get("multi_user"))
        except (ValueError, AttributeError):
            raise DraftModelError(
                f"--host: {host} answers with a page and not as KFP's API does: it may want a login first "
                "(--token-file, or a cookie in ~/.config/kfp/context.json), or a path is missing, such as /pipeline"
            ) from None
        if not several:
            if namespace:
                raise DraftModelError(
                    f"--namespace: given {namespace!r}, but {host} serves a single user in its own: leave it out"
                )
            return server
        if not (namespace := namespace or client.get_user_namespace()):
            raise DraftModelError(
                f"--namespace: not given, but {host} serves several users: name yours, of `kubectl get profiles`"
            )
        return replace(server, namespace=namespace)

    @property
    def host(self) -> str:
        """Address of the API."""
        return str(self.client._existing_config.host)

    def run_link(self, run_id: str) -> str:
        """Where the UI shows a run."""
        return f"{self.ui.rstrip('/')}/#/runs/details/{run_id}"

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Turns what goes wrong while the server is asked into sentences.

        Raises:
            ServerAway: where it does not answer or fails.
            NotLetIn: where it wants to know who asks.
            DraftModelError: where it refuses.
        """
        with explained(self.host, self.namespace):
            yield


def named(name: str) -> str:
    """Filter of a list that only what has this name passes."""
    return json.dumps({"predicates": [{"operation": _EQUALS, "key": "display_name", "stringValue": name}]})


class _Client(kfp.Client):  # type: ignore[misc]
    """kfp's client, which asks for the server's health when it is made: five times, with a traceback each."""

    def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
        """Asks once."""
        return self.healthzs.healthz_service_get_healthz(_request_timeout=TIMEOUT)


def connect(host: str = "", namespace: str = "", token_file: Path | None = None, ca_file: Path | None = None) -> Server:
    """Connects as kfp.Client does, with its environment variables and settings.

    Args:
        host: address of the UI or API; empty: the cluster that this pod or the kubeconfig means.
        namespace: of the user, on a server of several.
        token_file: holds a bearer token; it is read for each request, so that a new one takes effect.
        ca_file: certificates to trust, PEM.

    Raises:
        DraftModelError: where the server cannot be reached or does not let in.
    """
    if problems := problems_with(host, token_file, ca_file):
        raise DraftModelError(problems)
    from kfp.client import ServiceAccountTokenVolumeCredentials

    # Its retries are told once, by us; kfp_server_api sets the level of its parent.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    with explained(host or os.environ.get(ENDPOINT, ""), namespace), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "only works with v2.0.0-beta.2 and later"
        client = _Client(
            host=host or None,
            credentials=ServiceAccountTokenVolumeCredentials(str(token_file)) if token_file else None,
            ssl_ca_cert=str(ca_file) if ca_file else None,
        )
    return Server.of(client, namespace)


def problems_with(host: str, token_file: Path | None, ca_file: Path | None) -> list[str]:
    """What is wrong with the options of `connect` before anybody is asked, a sentence each."""
    problems = [
        f"--{option}-file: {problem}"
        for option, file in (("token", token_file), ("ca", ca_file))
        if file and (problem := _unreadable(file))
    ]
    if not host and not os.environ.get(ENDPOINT) and not _finds_cluster():
        problems.append(
            f"--host: not given, and neither {ENDPOINT} nor a kubeconfig says where KFP is; for one in a cluster: "
            f"`{_PORT_FORWARD}`, then --host http://127.0.0.1:8080"
        )
    return problems


def _unreadable(file: Path) -> str:
    try:
        return "" if file.read_bytes().strip() else f"{file} is empty"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"


def _finds_cluster() -> bool:
    kubeconfig = os.environ.get("KUBECONFIG", "~/.kube/config").split(os.pathsep)
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) or any(Path(f).expanduser().is_file() for f in kubeconfig)


@contextmanager
def explained(host: str, namespace: str = "") -> Iterator[None]:
    """See Server.asked.

    Args:
        host: address of the API, for the sentences.
        namespace: that was asked about; empty for none.
    """
    try:
        yield
    except kfp_server_api.ApiException as error:
        raise _refusal(error, host, namespace) from error
    except urllib3.exceptions.HTTPError as error:
        raise _no_answer(error, host) from error
    except OSError as error:  # the token's file, which is read for each request
        raise DraftModelError(f"--token-file: {error.filename} cannot be read: {error.strerror}") from error


def _refusal(error: kfp_server_api.ApiException, host: str, namespace: str) -> DraftModelError:
    said = _said(error.body) or error.reason or "no reason given"
    if not error.status or error.status >= 500 or error.status == 429:
        return ServerAway(f"{host} fails: {error.status}: {said}")
    if error.status == 401:
        return NotLetIn(
            f"{host} does not know who asks (401: {said}): give a token by --token-file, for example of `{_TOKEN}`"
        )
    if error.status == 403:
        where = f"in the namespace {namespace!r}" if namespace else "there"
        return DraftModelError(
            f"{host} does not allow this {where} (403: {said}): is the name right, and is the account of the token, or "
            "yours, a contributor of it?"
        )
    if error.status == 404:
        return DraftModelError(
            f"{host} does not have this (404: {said}); where it has nothing at all, a path such as /pipeline is "
            "missing, or KFP is older than 2.16"
        )
    return DraftModelError(f"{host} refuses: {error.status}: {said}")


def _said(body: str | bytes | None) -> str:
    """The server's own sentence: the gateway and the upload handler each have their own form."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    try:
        answer = json.loads(text)
    except ValueError:
        return "" if "<" in text else text.strip()[:300]
    if not isinstance(answer, dict):
        return text.strip()[:300]
    details = [detail for detail in answer.get("details") or () if isinstance(detail, dict)]
    for found in (answer, *details):
        if sentence := found.get("error_message"):
            return str(sentence)
    return str(answer.get("message") or answer.get("error") or "")


def _no_answer(error: urllib3.exceptions.HTTPError, host: str) -> ServerAway:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, urllib3.exceptions.SSLError):
        return ServerAway(
            f"--host: {host} cannot be trusted: {_last(reason)}; --ca-file names the certificate that its own hangs on"
        )
    return ServerAway(
        f"--host: {host} does not answer: {_last(reason)}; is the address right, and does the port-forward run "
        f"(`{_PORT_FORWARD}`)?"
    )


def _last(reason: BaseException) -> str:
    """The cause without the objects that urllib3 names before it."""
    return str(reason).partition("): ")[2] or str(reason) or type(reason).__name__
