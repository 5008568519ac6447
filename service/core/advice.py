"""Advice: what to write instead of an unknown word, and of what pydantic found to be wrong in a document."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, Final

Location = tuple[int | str, ...]
Place = tuple[str, ...]
Problem = tuple[Place, str]
Keys = Callable[[Location], Iterable[str]]

MEANT: Final = {"at_most": "below"}  # where spelling alone would suggest at_least, which is the opposite


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that an unknown one resembles, else all of them; it goes behind what is said of that."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; write one of {', '.join(names)}" if names else ""


def of(item: Any, known: Keys) -> str:
    """What to say of one of pydantic's errors, without the value; `known` gives the keys that fit at a location."""
    if item["type"] == "extra_forbidden":
        key, keys = str(item["loc"][-1]), list(known(item["loc"]))
        return f"unknown key{nearest(MEANT[key] if MEANT.get(key) in keys else key, keys)}"
    if item["type"] == "missing":
        return "is missing; add it"
    text: str = item["msg"].removeprefix("Value error, ")
    return text


def of_section(item: Any, known: Keys) -> str:
    """The same where a document is made of sections that are mappings."""
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "is no mapping; write key: value pairs"
    text = of(item, known)
    return text[:1].lower() + text[1:]
