"""Wanted people by the service's own data: members of audiences, what is known of them, and their scores."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import cached_property
from types import TracebackType
from typing import Any, Final

from audiences.destinations.protocol import Person, Purpose
from audiences.wanted import Candidate
from service.app import open_store
from service.consent import Identities, Known
from service.erasures import key_of
from service.members import ERASED, Audience, Members
from service.propensities import Propensities
from service.settings import Settings
from service.store import Store

PAGE: Final = 2_000
CHANGES: Final = 10_000
# What a person's fields are: a change of the last digits of a score is none that a CRM should be told of.
DIGITS: Final[Mapping[str, int]] = {"propensity": 4, "percentile": 1}
FIELDS: Final = ("propensity", "segment", "model", "entered_at")


class Live:
    """`Wanted` from the feature cache of the settings. Not for several threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.model_copy(update={"redis_timeout_ms": 10_000})
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()

    def __enter__(self) -> Live:
        try:
            self.store: Store = self._run(self._stack.enter_async_context(open_store(self._settings, 0)))
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
            self._run(self._stack.aclose())
        finally:
            self._runner.close()

    def _run(self, task: Any) -> Any:
        return self._runner.run(task)

    @cached_property
    def _audiences(self) -> Mapping[str, tuple[Audience, Mapping[str, Any]]]:
        found: list[Audience] = self._run(self.members.names())
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
        purposes = {str(purpose), definition.get("purpose") or str(purpose)}
        cursor = None
        while True:
            page = self._run(self.members.page(audience, cursor, PAGE))
            ids = [member.visitor_id for member in page.items]
            known: list[Known] = self._run(self.identities.read(ids)) if ids else []
            values = self._run(self._fields(definition, page.items, fields)) if ids else []
            for visitor_id, one, own in zip(ids, known, values, strict=True):
                allowed = all(one.consents.get(name, False) for name in purposes)
                person = Person(key_of(visitor_id), one.identifiers if allowed else {}, own if allowed else {})
                yield Candidate(person, one.rules, allowed)
            cursor = page.cursor
            if cursor is None:
                return

    async def _fields(
        self, definition: Mapping[str, Any], members: Sequence[Any], fields: Sequence[str]
    ) -> list[dict[str, str | float]]:
        found: list[dict[str, str | float]] = [{} for _ in members]
        model = definition.get("model")
        ids = [member.visitor_id for member in members]
        if model and "propensity" in fields:
            for own, score in zip(found, await self.propensities.of(model, ids), strict=True):
                if score is not None:
                    own["propensity"] = round(score, DIGITS["propensity"])
        if model and "segment" in fields:
            for own, segment in zip(found, await self.propensities.segments(model, ids), strict=True):
                if segment is not None:
                    own["segment"] = segment[0]
        if model and "model" in fields:
            for own in found:
                own["model"] = model
        return found

    def erased(self, audience: str) -> Iterator[str]:
        """Keys of those whose erasure ended a membership, as long as the journal of changes has it."""
        if audience not in self._audiences:
            return
        since = ""
        while True:
            page = self._run(self.members.changes(audience, since, CHANGES))
            yield from (change.visitor_id for change in page.items if not change.entered and change.why == ERASED)
            if page.cursor is None:
                return
            since = page.cursor
