"""The service's own data: who is wanted where by members, consents and scores, and what happened by the journals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import cached_property
from types import TracebackType
from typing import Any, Final

from audiences import triggers
from audiences.destinations.protocol import Person, Purpose
from audiences.wanted import Candidate
from service.app import open_store
from service.consent import Identities, Known
from service.core import bundle
from service.core.bundle import Bundle
from service.erasures import Erasures, key_of
from service.errors import CursorGone, InvalidCursor
from service.journal import Journal
from service.members import ERASED, Audience, Change, Members
from service.models import served_version
from service.propensities import Move, Propensities
from service.settings import Settings
from service.store import Store

PAGE: Final = 2_000
DIGITS: Final = 4  # of a score: a change beyond them is none that a CRM should be told of
OF_SCORE: Final = frozenset({"propensity", "percentile"})  # fields that a score says


class Live:
    """`Wanted` from the feature cache of the settings. Not for several threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.model_copy(update={"redis_timeout_ms": 10_000})
        self._bundles: dict[str, Bundle] = {}
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()

    def __enter__(self) -> Live:
        try:
            self.store: Store = self.run(self._stack.enter_async_context(open_store(self._settings, 0)))
        except BaseException:
            self._runner.close()
            raise
        self.members, self.identities = Members(self.store), Identities(self.store)
        self.propensities = Propensities(self.store)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.run(self._stack.aclose())
        finally:
            self._runner.close()

    def run(self, task: Any) -> Any:
        """Wait for something asynchronous."""
        return self._runner.run(task)

    @cached_property
    def _audiences(self) -> Mapping[str, tuple[Audience, Mapping[str, Any]]]:
        found: list[Audience] = self.run(self.members.names())
        return {one.name: (one, json.loads(one.definition)) for one in found if one.definition}

    def audiences(self) -> Mapping[str, Sequence[str]]:
        """The audiences that were refreshed, and where each goes by its definition."""
        return {name: definition.get("destinations", ()) for name, (_, definition) in self._audiences.items()}

    def minimum(self, audience: str) -> int:
        """`min_size` of the definition."""
        return int(self._audiences[audience][1].get("min_size", 1))

    def candidates(
        self, audience: str, purpose: Purpose, forms: Sequence[str], fields: Sequence[str]
    ) -> Iterator[Candidate]:
        """All members, page by page; who agreed agreed to the destination's purpose and to the audience's."""
        definition = self._audiences[audience][1]
        purposes = {purpose, definition.get("purpose") or purpose}
        cursor = None
        while True:
            page = self.run(self.members.page(audience, cursor, PAGE))
            ids = [member.visitor_id for member in page.items]
            yield from self.people(ids, self.run(self._fields(definition, ids, fields)), purposes)
            cursor = page.cursor
            if cursor is None:
                return

    def people(
        self, ids: Sequence[str], values: Sequence[Mapping[str, str | float]], purposes: Collection[str]
    ) -> Iterator[Candidate]:
        """Visitors with the values of their fields; who is allowed agreed to all the purposes."""
        known: list[Known] = self.run(self.identities.read(ids)) if ids else []
        for visitor_id, one, own in zip(ids, known, values, strict=True):
            allowed = all(one.consents.get(name, False) for name in purposes)
            person = Person(key_of(visitor_id), one.identifiers if allowed else {}, own if allowed else {})
            yield Candidate(person, one.rules, allowed)

    def of_score(self, model: str, score: float, fields: Collection[str]) -> dict[str, str | float]:
        """What those fields that are of a score say of it. Raises InvalidBundle."""
        said: dict[str, str | float] = {"propensity": round(score, DIGITS)} if OF_SCORE & set(fields) else {}
        if "percentile" in fields:
            said["percentile"] = self._percentile(model, score)
        return said

    def _percentile(self, model: str, score: float) -> int:
        """By the version that is served, in whole percents: finer ones tremble."""
        if model not in self._bundles:
            directory = self._settings.artifacts / model
            self._bundles[model] = bundle.load(directory / served_version(directory))
        return int(self._bundles[model].percentile(score))

    async def _fields(
        self, definition: Mapping[str, Any], ids: Sequence[str], fields: Sequence[str]
    ) -> list[dict[str, str | float]]:
        found: list[dict[str, str | float]] = [{} for _ in ids]
        model = definition.get("model")
        if model and OF_SCORE & set(fields):
            for own, score in zip(found, await self.propensities.of(model, ids), strict=True):
                if score is not None:
                    own |= self.of_score(model, score, fields)
        if model and "segment" in fields:
            for own, segment in zip(found, await self.propensities.segments(model, ids), strict=True):
                if segment is not None:
                    own["segment"] = segment[0]
        if model and "model" in fields:
            for own in found:
                own["model"] = model
        return found

    def erased(self, keys: Sequence[str]) -> Collection[str]:
        """Those of the keys whose visitors were erased within the retention."""
        found: Collection[str] = self.run(Erasures(self.store).noted(keys))
        return found


class Journals:
    """`triggers.Sources` from the same data: what moved between segments, and who entered audiences and left."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def names(self, options: triggers.Options) -> Sequence[str]:
        """Journals as `segments MODEL` and `audience NAME`."""
        wants = {kind.partition("_")[0] for kind in options.events}
        models, audiences = options.models, options.audiences
        if models is None:
            models = tuple(self._live.run(self._live.propensities.models()))
        if audiences is None:
            audiences = tuple(one.name for one in self._live.run(self._live.members.names()))
        return [
            *(f"segments {name}" for name in models if "segment" in wants),
            *(f"audience {name}" for name in audiences if "audience" in wants),
        ]

    def _journal(self, name: str) -> Journal:
        kind, _, own = name.partition(" ")
        return (self._live.propensities if kind == "segments" else self._live.members).journal(own)

    def end(self, name: str) -> str:
        """The number of the last line."""
        journal = self._journal(name)
        last = self._live.run(journal.last())
        return str(last) if last else ""

    def read(self, name: str, cursor: str, count: int) -> triggers.Read:
        """A page of a journal. Where it does not reach back so far, or was made anew, it is read from its beginning."""
        kind, _, own = name.partition(" ")
        gone = False
        reader: Any = self._live.propensities.moves if kind == "segments" else self._live.members.changes
        try:
            items = self._live.run(reader(own, cursor, count)).items
        except (CursorGone, InvalidCursor):
            gone, items = True, self._live.run(reader(own, "", count)).items
        events = [one for item in items for one in (_of_move if kind == "segments" else _of_change)(name, own, item)]
        return triggers.Read(events, items[-1].cursor if items else "" if gone else cursor, gone)

    def erased(self, visitor_ids: Sequence[str]) -> Collection[str]:
        """Those of the visitors who were erased and have not come back."""
        found: Collection[str] = self._live.run(self._live.members.erased(visitor_ids))
        return found


def _of_move(name: str, model: str, move: Move) -> Iterator[triggers.Event]:
    at = (move.at_ms, move.visitor_id, key_of(move.visitor_id))
    if move.left is not None:
        data = {"model": model, "segment": move.left, "next": move.entered}
        yield triggers.Event(name, move.cursor, "segment_left", *at, data)
    data = {"model": model, "segment": move.entered, "previous": move.left or ""}
    yield triggers.Event(name, move.cursor, "segment_entered", *at, data)


def _of_change(name: str, audience: str, change: Change) -> Iterator[triggers.Event]:
    data = {"audience": audience, "why": change.why}
    if change.why == ERASED and not change.entered:
        yield triggers.Event(name, change.cursor, "audience_left", change.at_ms, None, change.visitor_id, data)
        return
    kind: triggers.Kind = "audience_entered" if change.entered else "audience_left"
    yield triggers.Event(name, change.cursor, kind, change.at_ms, change.visitor_id, key_of(change.visitor_id), data)
