"""Identifiers: what a platform knows a person by, hashed or not, by their forms. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping

Identifiers = Mapping[str, tuple[str, ...]]


def packed(identifiers: Identifiers) -> str:
    """Identifiers as text."""
    return json.dumps({form: list(values) for form, values in sorted(identifiers.items())}, separators=(",", ":"))


def unpacked(text: str | None) -> Identifiers:
    """Identifiers of a text that `packed` wrote; none of none."""
    return {form: tuple(values) for form, values in json.loads(text).items()} if text else {}


def joined(one: Identifiers, other: Identifiers) -> Identifiers:
    """All identifiers of both."""
    return {
        form: tuple(sorted({*one.get(form, ()), *other.get(form, ())})) for form in sorted({*one.keys(), *other.keys()})
    }


def without(one: Identifiers, other: Identifiers) -> Identifiers:
    """The identifiers of the one that the other has not."""
    left = {form: tuple(value for value in values if value not in other.get(form, ())) for form, values in one.items()}
    return {form: values for form, values in left.items() if values}
