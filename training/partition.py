"""Partitions: the events of some visitors in memory, in canonical order. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.core import events
from service.core.events import Records
from service.core.spec import FeatureSpec
from training.columns import trait_keys

NEVER: Final = 2**62


@dataclass(frozen=True)
class Partition:
    """The events of some visitors in canonical order, each once. Visitor v owns records[starts[v]:starts[v + 1]]."""

    visitor_hash: npt.NDArray[np.uint64]  # [V] ascending
    visitor_ids: Sequence[str] | None  # [V]
    records: Records  # [E]
    starts: npt.NDArray[np.int64]  # [V + 1]
    request: npt.NDArray[np.float32]  # [E, R] the context of each event, as a request at that moment would carry it
    traits: Records  # [T]
    trait_starts: npt.NDArray[np.int64]  # [V + 1]
    joins: Joins | None = None  # None where nobody was joined

    def at(self, moment_ms: int) -> Partition:
        """Whom it holds at a moment, with what each has then; nobody who is joined into another by then."""
        if self.joins is None:
            return self
        stays = self.joins.until_ms > moment_ms
        kept, starts = _left(self.records, self.starts, stays, self.joins.since_ms <= moment_ms)
        kept_traits, trait_starts = _left(self.traits, self.trait_starts, stays, self.joins.trait_since_ms <= moment_ms)
        return Partition(
            self.visitor_hash[stays],
            None if self.visitor_ids is None else list(compress(self.visitor_ids, stays)),
            self.records.take(kept),
            starts,
            self.request.take(kept, axis=0),
            self.traits.take(kept_traits),
            trait_starts,
        )


@dataclass(frozen=True)
class Joins:
    """What logins made of the visitors of a partition; the rules are in `training.joins`.

    A visitor who was joined has what it did until then; the same is among the records of whom it was joined into.
    """

    since_ms: npt.NDArray[np.int64]  # [E] from when on a record is its visitor's; 0 where it always was
    trait_since_ms: npt.NDArray[np.int64]  # [T]
    until_ms: npt.NDArray[np.int64]  # [V] when the visitor was joined; NEVER if it was not
    person: npt.NDArray[np.int64]  # [V] the number of whom it was joined into, or its own


def _left(
    records: Records, starts: npt.NDArray[np.int64], stays: npt.NDArray[np.bool_], visible: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of the visible records of the visitors who stay, each once, and where those of each of them start."""
    owner = np.repeat(np.arange(len(stays)), np.diff(starts))
    kept = np.flatnonzero(visible & stays[owner])
    kept = kept[events.first_of_each(records.take(kept), owner[kept])]
    sizes = np.bincount(owner[kept], minlength=len(stays))[stays]
    return kept, np.concatenate(([0], np.cumsum(sizes)))


def assemble(spec: FeatureSpec, loaded: Mapping[str, Any], ids: Sequence[str] | None) -> Partition:
    """The partition of rows, which come sorted by visitor and time, with the ids of their visitors if wanted."""
    visitor = _plain(loaded["visitor_hash"], 0).astype(np.uint64)
    row = np.cumsum(np.concatenate(([False], visitor[1:] != visitor[:-1]))[: len(visitor)])  # rows come sorted
    hashes = visitor[np.searchsorted(row, np.arange(row[-1] + 1 if len(row) else 0))]
    attribute = _plain(loaded["attribute"], 0).astype(np.uint32)
    value = _plain(loaded["value"], np.nan).astype(np.float32)
    identifier = _plain(loaded["id"], 0).astype(np.uint32)
    unnamed = identifier == 0
    identifier[unnamed] = events.content_ids(attribute[unnamed], value[unnamed])
    kind = _plain(loaded["kind"], 0)
    every = events.records(loaded["ts_ms"], kind, identifier, attribute, value)
    request = np.empty((len(every), len(spec.requests)), np.float32)
    for place in range(len(spec.requests)):
        request[:, place] = _plain(loaded[f"request{place}"], np.nan)
    since = _plain(loaded["since_ms"], 0).astype(np.int64) if "since_ms" in loaded else None
    order = _order_ties(every, row, request, since)
    order = order[kind[order] > 0]
    records, owner = every.take(order), row[order]
    first = _first_of_each(records, owner, None if since is None else since[order])
    trait_records, trait_owner, trait_since = _trait_changes(spec, loaded, every["ts_ms"], row, since)
    visitors = np.arange(len(hashes) + 1)
    return Partition(
        visitor_hash=hashes,
        visitor_ids=ids,
        records=records.compress(first),
        starts=np.searchsorted(owner[first], visitors).astype(np.int64),
        request=request.take(order.compress(first), axis=0),
        traits=trait_records,
        trait_starts=np.searchsorted(trait_owner, visitors).astype(np.int64),
        joins=None if since is None else _joins(loaded, hashes, row, since[order][first], trait_since),
    )


def _joins(
    loaded: Mapping[str, Any],
    hashes: npt.NDArray[np.uint64],
    row: npt.NDArray[np.int64],
    since: npt.NDArray[np.int64],
    trait_since: npt.NDArray[np.int64],
) -> Joins:
    start = np.searchsorted(row, np.arange(len(hashes)))
    until = _plain(loaded["until_ms"], NEVER)[start].astype(np.int64)
    person = np.where(until < NEVER, _plain(loaded["person_hash"], 0)[start].astype(np.uint64), hashes)
    return Joins(since, trait_since, until, np.searchsorted(hashes, person))


def _first_of_each(
    records: Records, row: npt.NDArray[np.int64], since: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.bool_]:
    """`events.first_of_each`, and what is the visitor's before the one that it is the same as."""
    first = events.first_of_each(records, row)
    if since is not None:
        first[1:] |= since[1:] < since[:-1]
    return first


def _order_ties(
    records: Records,
    row: npt.NDArray[np.int64],
    request: npt.NDArray[np.float32] | None = None,
    since: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """int64[E]: canonical order of records that are already sorted by (row, ts); only ties have to be sorted.

    Twins are ordered by when they became the visitor's, and the same event delivered with two contexts by its request
    features.
    """
    order = np.arange(len(records))
    tied = (records["ts_ms"][1:] == records["ts_ms"][:-1]) & (row[1:] == row[:-1])
    if tied.any():
        places = np.flatnonzero(np.concatenate(([False], tied)) | np.concatenate((tied, [False])))
        if request is not None and request.shape[1]:
            places = places[np.lexsort(request[places].T)]
        if since is not None:
            places = places[np.argsort(since[places], kind="stable")]
        order[np.sort(places)] = places[events.canonical_order(records.take(places), row[places])]
    return order


def _trait_changes(
    spec: FeatureSpec,
    loaded: Mapping[str, Any],
    ts_ms: npt.NDArray[np.int64],
    row: npt.NDArray[np.int64],
    since: npt.NDArray[np.int64] | None,
) -> tuple[Records, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Trait records where a visitor's trait changes, and the last ones; whose they are, and since when. By visitor.

    Without the last record an event that arrives late would pass for news.
    """
    parts, owners, sinces = [np.empty(0, events.RECORD)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for place, (key, is_text) in enumerate(trait_keys(spec).items()):
        value = _plain(loaded[f"trait{place}"], np.nan).astype(np.float32)
        text = _plain(loaded[f"hash{place}"], 0).astype(np.uint32) if is_text else np.zeros(len(value), np.uint32)
        known = np.flatnonzero(text != 0 if is_text else np.isfinite(value))
        if since is None:
            known = known[~_inside_run(text[known], value[known], row[known], ts_ms[known])]
        kind = events.TRAIT_TEXT if is_text else events.TRAIT_NUMBER
        made = events.records(ts_ms[known], kind, events.hash32(key), text[known], value[known])
        begun = np.zeros(len(known), np.int64) if since is None else since[known]
        order = _order_ties(made, row[known], None, begun)
        made, owner, begun = made.take(order), row[known][order], begun[order]
        first = _first_of_each(made, owner, begun)
        made, owner, begun = made.compress(first), owner[first], begun[first]
        kept = ~_same_as_before(made["attribute"], made["value"], owner)
        kept[1:] |= begun[:-1] > np.maximum(begun, made["ts_ms"])[1:]  # the one before was not the visitor's yet
        kept |= np.concatenate((owner[1:] != owner[:-1], [True]))[: len(made)]
        parts.append(made.compress(kept))
        owners.append(owner[kept])
        sinces.append(begun[kept])
    joined, owner, begun = np.concatenate(parts), np.concatenate(owners), np.concatenate(sinces)
    order = events.canonical_order(joined, owner)
    return joined.take(order), owner[order], begun[order]


def _same_as_before(
    text: npt.NDArray[np.uint32], value: npt.NDArray[np.float32], owner: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """bool[n]: whether a trait of the same visitor says the same as the one before it."""
    same = np.zeros(len(text), np.bool_)
    bits = value.view(np.uint32)  # NaN is the same as NaN
    same[1:] = (text[1:] == text[:-1]) & (bits[1:] == bits[:-1]) & (owner[1:] == owner[:-1])
    return same


def _inside_run(
    text: npt.NDArray[np.uint32],
    value: npt.NDArray[np.float32],
    owner: npt.NDArray[np.int64],
    ts_ms: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """bool[n]: which of a trait's rows, sorted by (owner, ts), are surely neither a change nor the last.

    Of rows in one millisecond one alone will count, so neither they nor the one after them are sure.
    """
    inside = np.zeros(len(text), np.bool_)
    if len(text) > 2:
        same = _same_as_before(text, value, owner)
        again = np.zeros(len(text), np.bool_)
        again[1:] = (ts_ms[1:] == ts_ms[:-1]) & (owner[1:] == owner[:-1])
        unsure = again.copy()
        unsure[:-1] |= again[1:]
        inside[1:-1] = same[1:-1] & same[2:] & ~unsure[1:-1] & ~unsure[:-2]
    return inside


def _plain(column: Any, absent: Any) -> npt.NDArray[Any]:
    """A column as a plain array; NULLs, which DuckDB masks, become `absent`."""
    if isinstance(column, np.ma.MaskedArray):
        return np.asarray(column.filled(absent))
    return np.asarray(column)


def empty(spec: FeatureSpec, with_ids: bool) -> Partition:
    """A partition without visitors."""
    nothing, start = np.empty(0, events.RECORD), np.zeros(1, np.int64)
    request = np.empty((0, len(spec.requests)), np.float32)
    return Partition(np.empty(0, np.uint64), [] if with_ids else None, nothing, start, request, nothing, start)
