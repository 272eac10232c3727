"""torchrun that ends without a traceback of its own: its processes have said already why they ended."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Runs torchrun on this process's arguments.

    Returns:
        0, or what the first process that failed ended with; 128 + the signal's number where a signal ended it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun()
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return 128 + int(signal.Signals(stopped.sigval))
    return 0


if __name__ == "__main__":
    sys.exit(main())
