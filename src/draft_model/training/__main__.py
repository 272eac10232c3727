"""`torchrun -m draft_model.training`: one process of a training job."""

import sys

from draft_model.entrypoint import spare_libraries
from draft_model.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    spare_libraries()
    from draft_model.training.job import main

    sys.exit(main())
