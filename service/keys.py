"""The keys of what is kept of one visitor. Pure.

All begin with the namespace NS. ID is the visitor's id percent-encoded (UTF-8; all but ASCII letters, digits and
`_.-~`), so that no id can end the hash tag early or reach another key; the braces put all of them into one slot of a
cluster.

- `NS:e:{ID}` the visitor's event records and `NS:t:{ID}` its trait records; see `service.history`.
- `NS:i:{ID}` what the visitor said: hashed identifiers and consents; see `service.consent`.
- `NS:l:{ID}` a set of the anonymous visitors who are joined into this one; see `service.joining`.
"""

from __future__ import annotations

from typing import NamedTuple

from service.shards import tag_of, text_of


class Keys(NamedTuple):
    """The keys of one visitor: three values of records that grow, and the set of who is joined into it."""

    events: str
    traits: str
    said: str
    joined: str

    @property
    def values(self) -> tuple[str, str, str]:
        """Those of the records."""
        return self[:3]


def keys_of(namespace: str, visitor_id: str) -> Keys:
    """The keys of a visitor."""
    return _ending(namespace, f"{{{tag_of(visitor_id)}}}")


def beside(namespace: str, key: str) -> Keys:
    """The keys of the visitor that has this one, and this one."""
    return _ending(namespace, key[len(namespace) + len(":e:") :])


def _ending(namespace: str, tag: str) -> Keys:
    return Keys(f"{namespace}:e:{tag}", f"{namespace}:t:{tag}", f"{namespace}:i:{tag}", f"{namespace}:l:{tag}")


def visitor_of(namespace: str, key: str) -> str:
    """The visitor that has this key."""
    return text_of(key[len(namespace) + len(":e:{") : -1])


def letter_of(namespace: str, key: str) -> str:
    """What a key holds, as the letter that stands for it: e, t, i or l."""
    return key[len(namespace) + 1]
