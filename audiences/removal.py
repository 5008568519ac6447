"""Removals: the end of audiences that the definitions do not name any more. Only their changes stay, to be read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from audiences.definitions import CONTROL, Definitions, nearest
from audiences.refresh import PAGE, Page, Report, is_control, is_kept, unnamed
from service.core.errors import PropensityError

REMOVED: Final = "removed"  # why everybody left


class Lists(Protocol):
    """Where members are kept; `service.members.Members` is one."""

    async def page(self, audience: str, cursor: str | None, n: int) -> Page:
        """Up to n members after a cursor."""

    async def change(
        self, audience: str, entered: Mapping[str, int], left: Sequence[str], at_ms: int, why: str
    ) -> None:
        """Let visitors enter and leave; the same again changes nothing."""

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
