"""The exception for what a user can put right: sentences to act on, all of them at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_CREDENTIALS = re.compile(
    r"(?P<keep>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s'\"]*@"  # user:password@ of a URL
    r"|(?P<name>(?:X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature|token|sig)=)[^&\s'\"]+",
    re.IGNORECASE,
)


class Problem(str):
    """A sentence `parameter: message` that knows its parameter, or several with commas between."""

    parameter: str
    message: str

    def __new__(cls, parameter: str, message: str) -> Problem:
        """Joins both into the sentence that users read."""
        problem = super().__new__(cls, f"{parameter}: {message}")
        problem.parameter, problem.message = parameter, message
        return problem

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]  # exceptions are pickled between processes
        """The arguments of a copy."""
        return self.parameter, self.message

    @classmethod
    def of(cls, parameter: str, problem: str) -> Problem:
        """A sentence from elsewhere as one about this parameter, which it may name already."""
        return cls(parameter, problem.removeprefix(f"{parameter}: "))


class DraftModelError(Exception):
    """A bad parameter, an unreadable file, a store that refuses: sentences without credentials of URLs.

    Each names the parameter or file, what was given, what is allowed and what to do. Each entry point (CLI, KFP
    component, job pod) prints them without a traceback and exits with 2; anything else that escapes is a fault of ours.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [*map(_clean, [problems] if isinstance(problems, str) else problems)]
        super().__init__("\n".join(self.problems))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n".join([f"{len(self.problems)} problems:", *(f"  - {problem}" for problem in self.problems)])


def _clean(problem: str) -> str:
    if isinstance(problem, Problem):
        return Problem(problem.parameter, without_credentials(problem.message))
    return without_credentials(problem)


class Problems(list[str]):
    """Sentences that are collected, so that a user hears of all of them at once."""

    @contextmanager
    def collect(self, parameter: str = "") -> Iterator[None]:
        """Takes up the problems that are raised inside; those that name no parameter are about this one."""
        try:
            yield
        except DraftModelError as error:
            for problem in error.problems:
                named = not parameter or isinstance(problem, Problem)
                self.append(problem if named else Problem.of(parameter, problem))

    def raise_all(self) -> None:
        """Raises DraftModelError, unless there is no problem."""
        if self:
            raise DraftModelError(list(dict.fromkeys(self)))


class StoreUnavailable(DraftModelError):
    """An object store that cannot be reached, or is too busy to answer: worth another try later."""


def named_parameters(problems: Sequence[str]) -> set[str]:
    """The parameters that problems are about; sentences about none of them are left out."""
    return {problem.parameter for problem in problems if isinstance(problem, Problem)}


def without_credentials(text: object) -> str:
    """Text of a foreign exception or a URL without user, password, signature or token of the URLs in it."""
    return _CREDENTIALS.sub(lambda found: found["keep"] or f"{found['name']}***", str(text))
