"""Visitors: what is kept of each one, added to and held within its bounds.

A visitor's events, traits and what it said are values that grow, see `service.keys` and `service.values`. They expire
together, the retention after the last write to any. What is added to a visitor who was joined into another is moved to
whom it belongs; see `service.joining`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from service import consent, history, joining, values
from service.core.events import RECORD_BYTES
from service.errors import StoreError
from service.history import MOST_EVENTS, History
from service.joining import Login
from service.keys import Keys, keys_of, letter_of, visitor_of
from service.servers import Command, Refusal, granted
from service.store import Store
from service.values import Change

# What is let grow on top of the design's bound before a visitor is compacted.
MOST_EVENT_BYTES: Final = 2 * MOST_EVENTS * RECORD_BYTES
# A visitor has few traits and sends them again with every event; beyond this the latest of each are kept.
MOST_TRAIT_BYTES: Final = 64 * RECORD_BYTES

# Others may add to a visitor that is being settled; each try is a few round trips.
_MOST_TRIES: Final = 10


class _Bound(NamedTuple):
    """Of what size a value's records are, how large it is let grow, and what is kept of it then, at `now_ms`."""

    record_bytes: int
    most_bytes: int
    compact: Callable[[bytes, int], bytes]


_BOUNDS: Final = {
    "e": _Bound(RECORD_BYTES, MOST_EVENT_BYTES, lambda stored, _: history.trim_events(stored)),
    "t": _Bound(RECORD_BYTES, MOST_TRAIT_BYTES, history.compact_traits),
    "i": _Bound(consent.RECORD_BYTES, consent.MOST_BYTES, consent.compact),
}


class Visitors:
    """The visitors of a feature cache. Every failure is a StoreError; nothing is retried."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def append(self, additions: Mapping[str, History], now_ms: int) -> dict[str, History]:
        """Add records to visitors, in one round trip. Returns those that could not be added, by visitor.

        That is only where something else has put a value of another type under a key. Any other failure, also of a
        part, raises StoreError: the whole can be sent again without harm.
        """
        keys = [key for visitor_id in additions for key in self._store.keys(visitor_id)]
        blobs = [blob for history in additions.values() for blob in history]
        lengths = await self._grow(keys, blobs, now_ms)
        if -1 not in lengths:
            return {}
        lost = [blob if length < 0 else b"" for blob, length in zip(blobs, lengths, strict=True)]
        return {
            name: left for name, left in zip(additions, map(History, lost[::2], lost[1::2]), strict=True) if any(left)
        }

    async def append_missing(self, additions: Mapping[str, History], now_ms: int) -> int:
        """Add the records that are not there yet, and that compaction would keep. Returns how many were added.

        Doing it twice changes nothing the second time, so a replay can be cut off and begun again.
        """
        missing = {}
        for (visitor_id, new), known in zip(additions.items(), await self._store.read(list(additions)), strict=True):
            fresh = History(
                history.missing(known.events, new.events, history.compact_events),
                history.missing(known.traits, new.traits, lambda blob: history.compact_traits(blob, now_ms)),
            )
            if any(fresh):
                missing[visitor_id] = fresh
        unfit = await self.append(missing, now_ms)
        if unfit:
            raise StoreError(f"visitor {min(unfit)!r} has a key of another type in the feature cache; delete it")
        return sum(len(blob) for history in missing.values() for blob in history) // RECORD_BYTES

    async def append_said(self, additions: Mapping[str, bytes], now_ms: int) -> set[str]:
        """Add to what visitors said, in one round trip. Returns those who have something else under the key."""
        keys = [self._keys(visitor_id).said for visitor_id in additions]
        lengths = await self._grow(keys, list(additions.values()), now_ms)
        return {visitor_id for visitor_id, length in zip(additions, lengths, strict=True) if length < 0}

    async def settle(self, visitor_id: str, now_ms: int) -> bool:
        """Move what was added to a joined visitor to whom it belongs; nothing to do for any other.

        It is added there first and then taken away here, so that cut off in between it is in both places, which counts
        once: doubles are dropped when read. What is added meanwhile stays for the next time. False if something has to
        stay, since something else is under a key of whom it belongs to.
        """
        keys = self._keys(visitor_id).values
        for _ in range(_MOST_TRIES):
            stored = [value or b"" for value in await self._store.run(*(("GET", key) for key in keys))]
            parts = [joining.split(value) for value in stored]
            linked = next(filter(None, parts), None)
            tails = [value if part is None else part.tail for part, value in zip(parts, stored, strict=True)]
            if linked is None or not any(tails):
                return True
            if not await self._hand_over(linked.logins, *tails, now_ms=now_ms):
                return False
            changes = [Change(key, value, linked.head) for key, value in zip(keys, stored, strict=True) if value]
            (reply,) = await self._store.attempt(values.replacement(changes))
            if reply and not isinstance(reply, Refusal):
                return True
        return True

    async def sample(self, count: int) -> list[str]:
        """Ids of up to `count` visitors with events, picked at random."""
        addresses = await self._store.addresses()
        share: list[Command] = [("RANDOMKEY",)] * -(-count // len(addresses))
        replies = await asyncio.gather(*(self._store.run_on(address, *share) for address in addresses))
        namespace = self._store.namespace
        keys = [granted(key) for found in replies for key in found if key is not None]
        with_events = [key.decode() for key in keys if key.startswith(f"{namespace}:e:{{".encode())]
        return sorted({visitor_of(namespace, key) for key in with_events})[:count]

    async def _grow(self, keys: Sequence[str], blobs: Sequence[bytes], now_ms: int) -> list[int]:
        """What `values.append` gives; values that outgrew their bounds are compacted."""
        lengths = await values.append(self._store, keys, blobs)
        outgrown = [
            key
            for key, blob, length in zip(keys, blobs, lengths, strict=True)
            if length > 0 and self._has_outgrown(key, length - len(blob), length)
        ]
        if outgrown:
            await self._trim(outgrown, now_ms)
        return lengths

    def _has_outgrown(self, key: str, before: int, after: int) -> bool:
        """Whether a value is torn, or passed a multiple of its bound; not every append tries to compact."""
        bound = self._bound(key)
        return after % bound.record_bytes > 0 or before // bound.most_bytes < after // bound.most_bytes

    async def _trim(self, keys: Sequence[str], now_ms: int) -> None:
        """Compact values, but those that change meanwhile other than by growing; the next append sees to them then."""
        changes, linked = [], set()
        for key, value in zip(keys, await self._store.run(*(("GET", key) for key in keys)), strict=True):
            known = value or b""
            if joining.is_linked(known):
                linked.add(visitor_of(self._store.namespace, key))
                continue
            kept = self._bound(key).compact(known, now_ms)
            if len(kept) < len(known):
                changes.append(Change(key, known, kept))
        await self._store.run(*(values.replacement([change]) for change in changes))
        for visitor_id in sorted(linked):
            await self.settle(visitor_id, now_ms)

    async def _hand_over(
        self, logins: Sequence[Login], stored: bytes, traits: bytes, said: bytes, *, now_ms: int
    ) -> bool:
        """Give records to whom they belong by their time. False if something else is under a key of theirs."""
        known = history.unfold(stored, traits)
        events = dict(joining.by_owner(logins, known.events, RECORD_BYTES)) if known.events else {}
        traits_of = dict(joining.by_owner(logins, known.traits, RECORD_BYTES)) if known.traits else {}
        said_by = dict(joining.by_owner(logins, said, consent.RECORD_BYTES)) if said else {}
        owners = sorted({*events, *traits_of})
        additions = {owner: History(events.get(owner, b""), traits_of.get(owner, b"")) for owner in owners}
        unfit = bool(additions and await self.append(additions, now_ms))
        unfit |= bool(said_by and await self.append_said(said_by, now_ms))
        # An owner is told who is joined into it for as long as they are.
        keys = {self._keys(login.visitor_id).joined for login in logins}
        await self._store.run(*(("PEXPIRE", key, self._store.retention_ms) for key in sorted(keys)))
        return not unfit

    def _keys(self, visitor_id: str) -> Keys:
        return keys_of(self._store.namespace, visitor_id)

    def _bound(self, key: str) -> _Bound:
        return _BOUNDS[letter_of(self._store.namespace, key)]
