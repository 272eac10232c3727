"""Draft families: `base` says what everything else needs of one, each folder holds one or several of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from draft_model.errors import DraftModelError

if TYPE_CHECKING:
    from draft_model.drafts.base import Family

FAMILIES = {
    "eagle3": "draft_model.drafts.eagle3.config:EAGLE3",
    "eagle3.1": "draft_model.drafts.eagle3.config:EAGLE31",
    "dflash": "draft_model.drafts.dspark.config:DFLASH",
    "dspark": "draft_model.drafts.dspark.config:DSPARK",
}
"""Where each `Family` is; its modules are imported when it is used."""
DEFAULT = "eagle3"


def family(name: str) -> Family:
    """One family of the table, by the value of draft_architecture."""
    if name not in FAMILIES:
        raise DraftModelError(f"draft_architecture: given {name!r}; allowed: {', '.join(FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    found: Family = getattr(import_module(module), attribute)
    return found


def family_of(config: Mapping[str, Any], source: str = "config.json") -> Family:
    """The family of a draft, ours or another trainer's, by its config.json; an error names `source`."""
    for name in FAMILIES:
        if (found := family(name)).owns(config):
            return found
    raise DraftModelError(
        f"{source}: `architectures` is {config.get('architectures')!r}, which is no draft that can be read here; "
        f"known: {', '.join(family(name).title for name in FAMILIES)}"
    )
