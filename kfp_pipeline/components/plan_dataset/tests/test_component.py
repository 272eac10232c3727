"""What each pod encodes, and what makes a cached result stale."""

import json

from .. import plan_dataset


def test_the_parts_and_what_is_shown(call, world, imported):
    uri, version, _ = imported
    done = call(plan_dataset, **world.data, model_uri=uri, model_version=version, dataset_pods=3)
    assert [part["number"] for part in done.output] == [0, 1, 2]
    assert all(part["parts"] == 3 and part["model_version"] == version for part in done.output)
    assert done.text("summary").splitlines()[2:] == [
        "| train | train.jsonl | 0.0 MB |",
        "| validation | validation.jsonl | 0.0 MB |",
        "| 2 files, for 3 pods |  |  |",
    ]


def test_a_plan_changes_with_model_data_and_settings(call, world, imported, tmp_path):
    def plan(**changes):
        given = {**world.data, "model_uri": imported[0], "model_version": imported[1], **changes}
        return json.dumps(call(plan_dataset, **given).output)

    assert plan() == plan()
    other = tmp_path / "train.jsonl"
    other.write_text((world.root / "train.jsonl").read_text() * 2)
    plans = [plan(), plan(model_version="x"), plan(dataset_train_split=str(other)), plan(max_length=32)]
    assert len(set(plans)) == len(plans)


def test_a_folder_of_the_runs_own(call, world, imported, tmp_path):
    (part,) = call(plan_dataset, **world.data, model_uri=imported[0], storage_uri=str(tmp_path / "mine")).output
    assert part["uri"] == str(tmp_path / "mine/dataset")
