"""Lists in memory, as strict as those of the service: they hold what contracts say, and fail where they are broken."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.core.segments import SEGMENTS


class Member(NamedTuple):
    visitor_id: str
    entered_ms: int


class Page(NamedTuple):
    items: list[Member]
    cursor: str | None


class Known(NamedTuple):
    name: str
    size: int
    described_ms: int
    definition: str


class Change(NamedTuple):
    audience: str
    visitor_id: str
    entered: bool
    why: str
    at_ms: int


class Killed(Exception):
    """The process that is refreshing ends here."""


class Killable:
    """Takes `allowance` more changes, and then the process is killed; None takes all."""

    allowance: int | None = None

    def _spend(self) -> None:
        if self.allowance is not None:
            if self.allowance == 0:
                raise Killed
            self.allowance -= 1


class Lists(Killable):
    """Members of audiences."""

    def __init__(self) -> None:
        self.members: dict[str, dict[str, int]] = {}
        self.descriptions: dict[str, tuple[str, int]] = {}
        self.changes: list[Change] = []
        self.gone: set[str] = set()

    async def erased(self, ids: Sequence[str]) -> set[str]:
        return self.gone & set(ids)

    async def page(self, audience: str, cursor: str | None, n: int) -> Page:
        # In an order that has nothing to do with that of the population.
        order: Callable[[str], str] = lambda one: hashlib.sha256(one.encode()).hexdigest()  # noqa: E731
        ids = sorted(
            (one for one in self.members.get(audience, {}) if cursor is None or order(one) > cursor), key=order
        )
        items = [Member(one, self.members[audience][one]) for one in ids[:n]]
        return Page(items, order(ids[n - 1]) if len(ids) > n else None)

    async def change(
        self, audience: str, entered: Mapping[str, int], left: Sequence[str], at_ms: int, why: str
    ) -> None:
        assert why.isascii()
        assert not set(entered) & set(left)
        known = self.members.setdefault(audience, {})
        assert not self.gone & set(entered), "who was erased does not enter"
        for one, since_ms in entered.items():
            self._spend()
            if one not in known:
                known[one] = since_ms
                self.changes.append(Change(audience, one, True, why, at_ms))
        for one in left:
            self._spend()
            if known.pop(one, None) is not None:
                self.changes.append(Change(audience, one, False, why, at_ms))

    async def names(self) -> list[Known]:
        names = {*self.members, *self.descriptions}
        described = {name: self.descriptions.get(name, ("", 0)) for name in names}
        return [
            Known(name, len(self.members.get(name, {})), described[name][1], described[name][0])
            for name in sorted(names)
        ]

    async def describe(self, audience: str, definition_json: str, at_ms: int) -> None:
        self._spend()
        self.descriptions[audience] = (definition_json, at_ms)


class Scores(Killable):
    """Scores and segments of models."""

    def __init__(self) -> None:
        self.scores: dict[str, dict[str, tuple[float, int]]] = {}
        self.places: dict[str, dict[str, tuple[str, int]]] = {}
        self.moves: list[tuple[str, str, str | None, str, int]] = []

    async def put(
        self, model: str, version: str, ids: Sequence[str], propensity: npt.NDArray[np.float32], at_ms: int
    ) -> None:
        assert len(ids) == len(propensity)
        known = self.scores.setdefault(model, {})
        for one, score in zip(ids, propensity.tolist(), strict=True):
            if known.get(one, (0.0, 0))[1] <= at_ms:
                known[one] = (score, at_ms)

    async def segments(self, model: str, ids: Sequence[str]) -> list[tuple[str, int] | None]:
        return [self.places.get(model, {}).get(one) for one in ids]

    async def move(self, model: str, moves: Mapping[str, str], at_ms: int) -> None:
        known = self.places.setdefault(model, {})
        for one, segment in moves.items():
            assert segment in SEGMENTS
            self._spend()
            before = known.get(one)
            if before is None or (before[0] != segment and before[1] <= at_ms):
                known[one] = (segment, at_ms)
                self.moves.append((model, one, before[0] if before else None, segment, at_ms))
