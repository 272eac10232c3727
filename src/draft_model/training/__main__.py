"""`torchrun -m draft_model.training`: one process of a training job."""

import sys

from draft_model.training.job import main

if __name__ == "__main__":
    sys.exit(main())
