"""The exit task says how the run ended; what it deletes on a cluster is tests/cluster's."""

import pytest
from kfp.dsl import PipelineTaskFinalStatus

from .. import clean_up


@pytest.mark.parametrize(("state", "message"), [("SUCCEEDED", ""), ("FAILED", "the training job failed")])
def test_it_shows_how_the_run_ended(call, state, message):
    status = PipelineTaskFinalStatus(
        state=state,
        pipeline_job_resource_name="run",
        pipeline_task_name="steps",
        error_code=None,
        error_message=message,
    )
    shown = call(clean_up, run_id="r", training_backend="local", status=status).text("summary").splitlines()
    assert shown == [
        f"- the steps ended: {state}",
        *([f"- {message}"] if message else []),
        "- no training job was left",
    ]
