"""The pipeline's exit task deletes a run's jobs of every kind that its account may have made."""

from __future__ import annotations

import pytest

from draft_model.jobs.backend import Forbidden
from draft_model.jobs.kubernetes import delete_run
from draft_model.jobs.pytorchjob import PYTORCHJOB, PyTorchJobs
from draft_model.jobs.trainjob import TRAINJOB
from jobs.fake import FakeCluster
from jobs.requests import GOLDEN


class Strict(FakeCluster):
    """A cluster that has both kinds, and whose Role grants only some of them."""

    def __init__(self, *granted):
        super().__init__()
        self.granted = granted

    def has(self, kind):
        return True

    def objects(self, kind, selector=""):
        if kind not in self.granted:
            raise Forbidden(f"list {kind.plural}")
        return super().objects(kind, selector)


def test_a_kind_that_the_account_may_not_see_does_not_keep_the_others():
    cluster = Strict(PYTORCHJOB)
    job = PyTorchJobs(cluster).create_or_adopt(GOLDEN["1x1"])
    assert delete_run(cluster, [TRAINJOB, PYTORCHJOB], GOLDEN["1x1"].run_id) == [f"pytorchjobs/{job.name}"]
    assert cluster.objects(PYTORCHJOB) == []


def test_an_account_that_may_see_nothing_does_not_pass_for_a_clean_cluster():
    with pytest.raises(Forbidden):
        delete_run(Strict(), [TRAINJOB, PYTORCHJOB], "run")
