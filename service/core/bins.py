"""The bins of a reference: what each is called, and how many of the values that were scored fall into each.

Bins lie one behind the other: those of the first feature, of the second ..., and last those of the score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from service.core.bundle import Bins, Bundle
from service.core.drift import SCORE as SCORE
from service.core.spec import Feature, Request, Trait

MISSING: Final = "missing"
_ANY: Final = "any value"
_OTHER: Final = "other"
_LISTED: Final = "category"
_FEWEST_DIGITS, _ALL_DIGITS = 4, 17
_MOST_NAMES: Final = 3

Counts = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """Where B bins of F features and of the score lie. Made by `layout`."""

    features: tuple[str, ...]  # [B] the feature of each bin
    texts: tuple[str, ...]  # [B] what it is called, unique within a feature
    shares: tuple[float, ...]  # [B] of the training population
    edges: Rows  # [K, 1] of all features; the least float32 not below the edge of the reference
    columns: Counts  # [K] whose they are
    begins: Counts  # [B] places in `above`: a bin holds what lies above its begin ...
    ends: Counts  # [B] ... and not above its end

    def count(self, matrix: Rows, scores: Rows) -> Counts:
        """int64[B]: how many values of feature rows float32[n, F] and of scores float32[n] are in each bin.

        The same as `searchsorted(edges, value, "right")` in float64; NaN is missing.
        """
        lines = np.concatenate((matrix, scores[:, np.newaxis]), axis=1).T.copy()
        known = len(scores) - np.count_nonzero(np.isnan(lines), axis=1)
        above = np.count_nonzero(lines[self.columns] >= self.edges, axis=1)
        reached = np.concatenate((above, known, len(scores) - known, (0,)))
        counts: Counts = reached[self.begins] - reached[self.ends]
        return counts


def layout(bundle: Bundle) -> Layout:
    """The bins of a bundle's reference."""
    spec, reference = bundle.spec, bundle.reference
    described = {**{name: reference.features[name] for name in spec.names}, SCORE: reference.score}
    names = [texts(bins, spec.features.get(name)) for name, bins in described.items()]
    sizes = [len(bins.edges) for bins in described.values()]
    return Layout(
        features=tuple(name for name, bins in described.items() for _ in bins.shares),
        texts=tuple(text for own in names for text in own),
        shares=tuple(share for bins in described.values() for share in bins.shares),
        edges=_rounded_up(np.array([edge for bins in described.values() for edge in bins.edges]))[:, np.newaxis],
        columns=np.repeat(np.arange(len(sizes)), sizes),
        **_places(sizes),
    )


def _rounded_up(edges: npt.NDArray[np.float64]) -> Rows:
    """The least float32 that is not below: a float32 reaches the one if and only if it reaches the other."""
    with np.errstate(over="ignore"):  # the one above the largest is infinity
        nearest = edges.astype(np.float32)
        raised: Rows = np.where(nearest < edges, np.nextafter(nearest, np.float32(np.inf)), nearest)
    return raised


def _places(sizes: Sequence[int]) -> dict[str, Counts]:
    """Where `count` finds what reaches into the bins, given how many edges each feature has."""
    features, edges = len(sizes), sum(sizes)
    nothing, first = edges + 2 * features, 0
    begins: list[int] = []
    ends: list[int] = []
    for place, size in enumerate(sizes):
        known, own = edges + place, range(first, first + size)
        begins += [known + features, known, *own]
        ends += [nothing, *own, nothing]
        first += size
    return {"begins": np.array(begins), "ends": np.array(ends)}


def texts(bins: Bins, feature: Feature | None = None) -> tuple[str, ...]:
    """What the bins of a feature (None: of the score) are called: `missing`, `below 3`, `3 to 7.5`, `from 40`.

    Those of categories have their names, and `other`. Different bins have different texts. Numbers are shortened as far
    as that allows; whole ones are exact.
    """
    named = _category_texts(bins, feature) if isinstance(feature, Trait | Request) else None
    return (MISSING, *(named or _range_texts(bins.edges)))


def _range_texts(edges: Sequence[float]) -> list[str]:
    if not edges:
        return [_ANY]
    written = _written(edges)
    between = [f"{low} to {high}" for low, high in pairwise(written)]
    return [f"below {written[0]}", *between, f"from {written[-1]}"]


def _written(numbers: Sequence[float]) -> list[str]:
    """Different numbers as different texts, with as few digits as that takes."""
    for digits in range(_FEWEST_DIGITS, _ALL_DIGITS):
        short = [_text(number, digits) for number in numbers]
        if len(set(short)) == len(short):
            return short
    return [_text(number, _ALL_DIGITS) for number in numbers]


def _text(number: float, digits: int) -> str:
    if number.is_integer() and abs(number) < 1e15:
        return str(int(number))
    short = float(f"{number:.{digits}g}")
    plain = 1e-6 <= abs(short) < 1e15
    return np.format_float_positional(short, trim="-") if plain else repr(short)


def _category_texts(bins: Bins, feature: Trait | Request) -> list[str] | None:
    """The categories of each bin; None where a bin is not that of one code, as in a reference by quantiles."""
    names: dict[float, list[str]] = {}
    for category, code in feature.codes.items():
        names.setdefault(code, []).append(category)
    codes = sorted({*names, *([] if np.isnan(feature.other) else [feature.other])})
    if np.searchsorted(bins.edges, codes, "right").tolist() != list(range(len(bins.edges) + 1)):
        return None
    return list(_unique(names.get(code) for code in codes))


def _unique(categories: Iterator[Sequence[str] | None]) -> Iterator[str]:
    """A text for the categories of each bin, `other` for those that are not listed (None)."""
    seen = {MISSING, _OTHER}
    for listed in categories:
        if listed is None:
            yield _OTHER
            continue
        text = ", ".join(listed[:_MOST_NAMES]) + (" ..." if len(listed) > _MOST_NAMES else "")
        while text in seen:
            text = f"{_LISTED} {text}"
        seen.add(text)
        yield text
