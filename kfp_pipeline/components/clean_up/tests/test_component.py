"""The exit task says how the run ended; what it deletes on a cluster is tests/cluster's."""

import pytest
from kfp.dsl import PipelineTaskFinalStatus

from .. import clean_up


@pytest.mark.parametrize(
    ("state", "message", "said"),
    [("COMPLETE", "", "all steps succeeded"), ("FAILED", "no GPU", "the last lines of its log say why (no GPU)")],
)
def test_it_shows_how_the_run_ended(call, state, message, said):
    status = PipelineTaskFinalStatus(
        state=state,
        pipeline_job_resource_name="run",
        pipeline_task_name="steps",
        error_code=None,
        error_message=message,
    )
    shown = call(clean_up, run_id="r", training_backend="local", status=status).text("summary")
    assert said in shown
    assert ("there is no whole checkpoint" in shown) == (state == "FAILED")
