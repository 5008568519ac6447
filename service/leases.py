"""Leases: a chore is one process's for a time, of all that share the feature cache.

`NS:NAME` holds who has the lease of that name, and expires with it.
"""

from __future__ import annotations

from typing import Final

from service.shards import Cache

# Gives KEYS[1] to ARGV[1] for ARGV[2] milliseconds, unless it is another's.
_LEASE: Final = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""


async def lease(cache: Cache, name: str, owner: str, ms: int) -> bool:
    """Give `name` to `owner` for a time, anew or on top. Returns whether it is not another's."""
    (is_given,) = await cache.run(("EVAL", _LEASE, 1, f"{cache.namespace}:{name}", owner, ms))
    return bool(is_given)
