"""Whether a Kubeflow Pipelines server is new enough for the pipeline."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

HEALTH = "/apis/v2beta1/healthz"
"""Answers without a login, and with the version: `tag_name` of the server, `apiServerTagName` of its UI."""
_NEEDED = (2, 16, 1)
_SECONDS = 3.0


def too_old(server: str, health: Mapping[str, Any]) -> str:
    """Says that a server is too old, by its answer to HEALTH; empty where it is not, or does not say its version."""
    tag = str(health.get("tag_name") or health.get("apiServerTagName") or "")
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", tag)
    if found is None or tuple(map(int, found.groups())) >= _NEEDED:
        return ""
    return f"{server} is KFP {tag}; the pipeline needs {'.'.join(map(str, _NEEDED))} or newer"


def own_server_too_old() -> str:
    """The same of the server in whose pod this process is; empty, too, where it cannot be asked from here."""
    import urllib3

    host = os.environ.get("ML_PIPELINE_SERVICE_HOST", "ml-pipeline.kubeflow")  # another namespace, several users
    url = f"http://{f'[{host}]' if ':' in host else host}:{os.environ.get('ML_PIPELINE_SERVICE_PORT', '8888')}"
    with suppress(urllib3.exceptions.HTTPError, ValueError):
        health = json.loads(urllib3.request("GET", url + HEALTH, timeout=_SECONDS, retries=False).data)
        return too_old(url, health) if isinstance(health, dict) else ""
    return ""
