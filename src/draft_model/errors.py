"""The one exception that a user's mistake raises: sentences to act on, all of them at once."""

from __future__ import annotations

from collections.abc import Sequence


class DraftModelError(Exception):
    """What the user can put right: a bad parameter, an unreadable file, a store that refuses.

    Every door (CLI, KFP component, job pod) prints the problems without a traceback and exits with 2. Anything
    else that escapes is a fault of ours and keeps its traceback.

    Args:
        problems: one sentence, or a list of them; each names the parameter or file, what was given, what is
            allowed and what to do.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n".join([f"{len(self.problems)} problems:", *(f"  - {problem}" for problem in self.problems)])


class StoreUnavailable(DraftModelError):
    """An object store that cannot be reached, or is too busy to answer: worth another try later."""
