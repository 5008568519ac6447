"""Removals: the end of audiences that the definitions do not name any more. Only their changes stay, to be read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, Protocol

from audiences import refresh
from audiences.definitions import CONTROL, Definitions
from audiences.refresh import PAGE, Report, is_control, is_kept, unnamed
from service.core.advice import nearest
from service.core.errors import PropensityError

REMOVED: Final = "removed"  # why everybody left


class Lists(refresh.Lists, Protocol):
    """The lists that are refreshed, whose definitions can be taken away."""

    async def undescribe(self, audience: str) -> None:
        """Say nothing any more of what an audience is."""


def chosen(known: Sequence[Any], definitions: Definitions, names: Sequence[str]) -> list[Any]:
    """What is known of each audience to be removed. Raises PropensityError where one of the names is none of them."""
    kept = {one.name: one for one in known if is_kept(one)}
    free = [name for name in unnamed(known, definitions) if not is_control(name)]
    for name in names:
        if name in definitions.audiences:
            raise PropensityError(
                f"{name} is in the definitions, and the next refresh would make it again; take it out of the file first"
            )
        if name not in free:
            raise PropensityError(f"there is no audience {name!r} to remove{nearest(name, free)}")
    return [kept[name] for name in dict.fromkeys(names)]


def destinations(known: Any) -> Sequence[str]:
    """Where an audience goes by its definition."""
    found: Sequence[str] = json.loads(known.definition or "{}").get("destinations", ())
    return found


async def remove(members: Lists, name: str, now_ms: int, report: Report = lambda stage, share: None) -> int:
    """Let everybody leave an audience and its hold-out, then forget what it was; how many left.

    Cut off, it is ended by another call.
    """
    left = 0
    for own in (f"{name}{CONTROL}", name):
        while ids := [one.visitor_id for one in (await members.page(own, None, PAGE)).items]:
            report(f"Removing {name}", 0)
            await members.change(own, {}, ids, now_ms, REMOVED)
            left += len(ids)
        await members.undescribe(own)
    return left
