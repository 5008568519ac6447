"""Persons: a known visitor and the anonymous ones who turned out to be that one; joining them, and erasing them.

`service.joining` says what stands under the keys of who is joined; a set under a key of the known one names them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from service import joining
from service.erasures import Erasures
from service.errors import StoreError
from service.joining import Linked, Login
from service.keys import Keys, keys_of
from service.members import Members
from service.propensities import Propensities
from service.servers import Command, Refusal, granted
from service.store import Store
from service.streams import Quarantine, ScoreStream
from service.visitors import Visitors

# Notes in KEYS[2] that ARGV[1] is about to be joined into the visitor whose events KEYS[1] has. Returns 1; 0 if that
# one is joined into another itself, and -1 if there are ARGV[3] already. ARGV[2] begins what is joined.
_NOTE_JOINED: Final = """
local value = redis.call('GET', KEYS[1]) or ''
if string.sub(value, 1, #ARGV[2]) == ARGV[2] then return 0 end
if redis.call('SISMEMBER', KEYS[2], ARGV[1]) == 0 and redis.call('SCARD', KEYS[2]) >= tonumber(ARGV[3]) then
  return -1
end
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
"""

# Puts the head ARGV[2] before three values, or in place of the head ARGV[1] that they begin with. Returns 1; 0 if they
# begin otherwise by now, or if ARGV[5] is 1 and something stands behind that head, which may have been handed over
# already to whom it says; and -1 if somebody is joined into this visitor. ARGV[3] begins any head.
_LINK: Final = """
if redis.call('SCARD', KEYS[4]) > 0 then return -1 end
local values = {}
for place = 1, 3 do
  local value = redis.call('GET', KEYS[place]) or ''
  if string.sub(value, 1, #ARGV[3]) == ARGV[3] then
    if ARGV[1] == '' or string.sub(value, 1, #ARGV[1]) ~= ARGV[1] then return 0 end
    value = string.sub(value, #ARGV[1] + 1)
    if ARGV[5] == '1' and value ~= '' then return 0 end
  elseif place == 1 and ARGV[1] ~= '' then
    return 0
  end
  values[place] = ARGV[2] .. value
end
for place = 1, 3 do redis.call('SET', KEYS[place], values[place], 'PX', ARGV[4]) end
return 1
"""
# Two processes may join the same visitor at once; each try is a few round trips.
_MOST_TRIES: Final = 10


class Family(NamedTuple):
    """A visitor, and the anonymous ones who are joined into it: one person under several ids."""

    visitor_id: str
    joined: Sequence[str]


class Persons:
    """Whose ids belong together. Every failure is a StoreError."""

    def __init__(self, store: Store) -> None:
        self._store, self._visitors = store, Visitors(store)

    async def join(self, logins: Sequence[tuple[str, Login]], now_ms: int) -> list[str]:
        """Join anonymous visitors into who they logged in as. Returns `joined`, `known` or `refused` for each.

        It is `known` where it changes nothing, and `refused` where one of the two cannot be joined: others are joined
        into the anonymous one, so that it is a known one itself, or too many into the known one. Cut off at any point
        and begun again, it ends the same.
        """
        links = await self._links([name for anonymous, login in logins for name in (anonymous, login.visitor_id)])
        outcomes = []
        for (anonymous, login), linked, other in zip(logins, links[::2], links[1::2], strict=True):
            owner = other.owner if other else login.visitor_id
            if owner == anonymous:
                outcomes.append("known")
            elif linked and joining.owner_at(linked.logins, login.ts_ms) == owner:
                if linked.tail:
                    await self._visitors.settle(anonymous, now_ms)
                outcomes.append("known")
            else:
                outcomes.append(await self._join(anonymous, login, now_ms))
        return outcomes

    async def _join(self, anonymous: str, login: Login, now_ms: int) -> str:
        settle = self._visitors.settle
        for _ in range(_MOST_TRIES):
            linked, other = await self._links([anonymous, login.visitor_id])
            owner = other.owner if other else login.visitor_id
            known = linked.logins if linked else ()
            logins = joining.with_login(known, Login(login.ts_ms, owner))
            if owner == anonymous or logins == known:
                await settle(anonymous, now_ms)
                return "known"
            # First who is joined into the owner, so that erasing it reaches them; then, in one step, the link itself.
            if (noted := await self._note_joined(anonymous, owner)) < 0:
                return "refused"
            settled = await settle(anonymous, now_ms) if noted and linked else False
            old = linked.head if linked else b""
            done = await self._link(anonymous, old, joining.head(logins), settled=settled) if noted else 0
            if done < 0:
                await self._store.run(("SREM", self._keys(owner).joined, anonymous))
                return "refused"
            if done:
                await settle(anonymous, now_ms)
                # Its scores are of whom it belongs to from now on.
                await Propensities(self._store).drop([anonymous])
                return "joined"
        raise StoreError("a visitor is being joined by others at this moment; try again later")

    async def _note_joined(self, anonymous: str, owner: str) -> int:
        keys = self._keys(owner).events, self._keys(owner).joined
        given = anonymous.encode("utf-8", "surrogatepass"), joining.MAGIC, joining.MOST_JOINED, self._store.retention_ms
        return await self._if_of_its_type(("EVAL", _NOTE_JOINED, len(keys), *keys, *given))

    async def _link(self, visitor_id: str, old: bytes, new: bytes, settled: bool = False) -> int:
        keys = self._keys(visitor_id)
        given = old, new, joining.MAGIC, self._store.retention_ms, int(settled)
        return await self._if_of_its_type(("EVAL", _LINK, len(keys), *keys, *given))

    async def _if_of_its_type(self, script: Command) -> int:
        """What a script returns, -1 where something else lies under one of its keys."""
        (reply,) = await self._store.attempt(script)
        return -1 if isinstance(reply, Refusal) and reply.is_wrong_type else int(granted(reply))

    async def family(self, visitor_id: str) -> Family:
        """Who a visitor is, itself or whom it was joined into, and all anonymous ones that are joined into that one."""
        (linked,) = await self._links([visitor_id])
        owner = linked.owner if linked else visitor_id
        noted = await self._noted_joined(owner)
        return Family(owner, [name for name, one in noted.items() if one is not None and one.owner == owner])

    async def _noted_joined(self, owner: str) -> dict[str, Linked | None]:
        """Who was to be joined into a visitor, in order, and what their events begin with."""
        (reply,) = await self._store.attempt(("SMEMBERS", self._keys(owner).joined))
        found = () if isinstance(reply, Refusal) and reply.is_wrong_type else granted(reply)
        names = sorted(name.decode("utf-8", "surrogatepass") for name in found)
        return dict(zip(names, await self._links(names), strict=True))

    async def _links(self, visitor_ids: Sequence[str]) -> list[Linked | None]:
        """Into whom each visitor was joined, None where it was not."""
        if not visitor_ids:
            return []
        replies = await self._store.attempt(*(("GET", self._keys(visitor_id).events) for visitor_id in visitor_ids))
        return [
            None if isinstance(reply, Refusal) and reply.is_wrong_type else joining.split(granted(reply))
            for reply in replies
        ]

    async def erase(self, visitor_id: str) -> bool:
        """Delete everything that is kept of a person, refused events too. Returns whether there was anything.

        The person is the visitor with all of `family`. Cut off and begun again it ends the same: who was asked for
        goes last, after what tells who else is meant.
        """
        owner, joined = await self.family(visitor_id)
        names = {owner, *joined, visitor_id}
        deleted = await Quarantine(self._store).erase(names)
        deleted += await ScoreStream(self._store).erase(names)
        for name in sorted(names - {visitor_id}):
            deleted += await self._erase_one(name)
        await self._leave_shared(owner)
        await self._store.run(("DEL", self._keys(owner).joined))
        deleted += await self._erase_one(visitor_id)
        return bool(deleted)

    async def _erase_one(self, visitor_id: str) -> int:
        """Delete a visitor's own keys, then note that, then take it out of all sets: `service.erasures` says why."""
        deleted: int = sum(await self._store.run(*(("DEL", key) for key in self._keys(visitor_id).values)))
        await Erasures(self._store).note(visitor_id)
        deleted += await Propensities(self._store).forget([visitor_id])
        return deleted + await Members(self._store).forget([visitor_id])

    async def _leave_shared(self, owner: str) -> None:
        """Take a visitor out of the logins of those who were joined into another one later."""
        for name, linked in (await self._noted_joined(owner)).items():
            if linked is not None and linked.owner != owner:
                logins = [login for login in linked.logins if login.visitor_id != owner]
                if len(logins) < len(linked.logins):
                    await self._link(name, linked.head, joining.head(logins))

    def _keys(self, visitor_id: str) -> Keys:
        return keys_of(self._store.namespace, visitor_id)
