"""What a person sees of a training: a bar with tokens per second and the time left, and a line per log window."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_SECONDS = 15.0  # between two states of the bar where it goes to a log and not to a terminal
_ACCEPTANCE = "loss {loss}, acceptance by position {conditional}, acceptance length {length:.2f} (simulated)"


class Progress:
    """The bar of one training, over the tokens that will go through the draft; only the first rank shows it."""

    def __init__(self, tokens: int, speaks: bool) -> None:
        self._speaks = speaks
        self._bar = tqdm(
            total=tokens, unit="token", unit_scale=True, desc="training", disable=not speaks,
            mininterval=0.5 if sys.stderr.isatty() else LOG_SECONDS, dynamic_ncols=True,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, tokens: int, where: str, window: Any) -> None:
        """Moves the bar on by the tokens of a step (`where`), and shows the loss since the last log line (`window`)."""
        loss = f", loss {float(window.loss[0] / window.supervised[0]):.2f}" if window.supervised[0] > 0 else ""
        self._bar.set_postfix_str(f"{where}{loss}", refresh=False)
        self._bar.update(tokens)

    def log(self, record: dict[str, Any]) -> None:
        """Writes the line of one log window."""
        if self._speaks:
            logger.info(
                "step %d, epoch %d: %s, learning rate %.1e, gradient norm %.1f, %.0f tokens/s", record["step"],
                record["epoch"], _measured(record), record["learning_rate"], record["grad_norm"],
                record["tokens_per_second"],
            )  # fmt: skip

    def log_validation(self, record: dict[str, Any]) -> None:
        """Writes the line of one validation."""
        if self._speaks:
            logger.info("validation after step %d: %s", record["step"], _measured(record))


def _measured(record: dict[str, Any]) -> str:
    loss, conditional = (
        " ".join("-" if value is None else f"{value:.2f}" for value in record[name])
        for name in ("loss", "conditional_acceptance")
    )
    return _ACCEPTANCE.format(loss=loss, conditional=conditional, length=record["acceptance_length"])
