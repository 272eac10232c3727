"""The container images of the steps, named once."""

VERSION = "0.0.1"
REGISTRY = "ghcr.io/pipeline-draft-model"
STAGE_IMAGE = f"{REGISTRY}/stage:{VERSION}"
