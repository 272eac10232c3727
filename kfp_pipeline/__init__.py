"""All that Kubeflow sees: the pipeline `pipeline_draft_model`, its components and the ways to run it."""
