"""The container image of the steps, named once.

DRAFT_MODEL_IMAGE (`draft-model compile --image`) names the one that a cluster can pull; the default belongs to no
registry, so that nothing is ever pulled from a stranger.
"""

import os

STAGE_IMAGE = os.environ.get("DRAFT_MODEL_IMAGE", "localhost/pipeline-draft-model/stage:0.0.1")
