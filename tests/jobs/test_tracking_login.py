"""The job's pods log in to the tracking server as the step does that starts them, and no secret is written down."""

import json
from dataclasses import replace

from draft_model.jobs.place import login_of
from draft_model.jobs.pods import pod_spec
from jobs.requests import request

KEY = {"name": "mlflow-login", "key": "token"}
# As Kubeflow Pipelines 2.17 makes the pod of a task where its MLflow plugin logs in by a Secret.
POD = {
    "spec": {
        "containers": [
            {
                "name": "main",
                "env": [
                    {"name": "MLFLOW_TRACKING_URI", "value": "https://mlflow"},
                    {"name": "MLFLOW_TRACKING_TOKEN", "valueFrom": {"secretKeyRef": KEY}},
                    {"name": "MLFLOW_TRACKING_PASSWORD", "value": "written in the open"},
                    {"name": "OTHER", "valueFrom": {"secretKeyRef": KEY}},
                ],
            },
            {"name": "wait"},
        ]
    }
}


def test_references_to_secrets_are_handed_on():
    assert login_of(POD) == {"MLFLOW_TRACKING_TOKEN": KEY}
    assert login_of(None) == {}


def test_the_pods_have_them():
    spec = pod_spec(replace(request(), login=login_of(POD)), "pytorch")
    (container,) = spec["containers"]
    assert {"name": "MLFLOW_TRACKING_TOKEN", "valueFrom": {"secretKeyRef": KEY}} in container["env"]
    assert "written in the open" not in json.dumps(spec)
