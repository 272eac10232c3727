"""Draft families: `base` says what everything else needs of one, each folder holds one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from draft_model.errors import DraftModelError

if TYPE_CHECKING:
    from draft_model.drafts.base import Family

FAMILIES = {"eagle3": "draft_model.drafts.eagle3.family:EAGLE3"}
"""Where each `Family` is; its modules are imported when it is used."""


def family(name: str = "eagle3") -> Family:
    """One family of the table.

    Raises:
        DraftModelError: where there is none of this name.
    """
    if name not in FAMILIES:
        raise DraftModelError(f"draft_architecture: given {name!r}; allowed: {', '.join(FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    found: Family = getattr(import_module(module), attribute)
    return found
