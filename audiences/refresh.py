"""Refreshing: from snapshots of scores to who is in which segment and which audience, and what changed.

Everything is decided for the moment of the scores, and written as differences to what the lists hold. A refresh that
was cut off at any point, and is run again with the same scores, ends as one that was not; run once more, it changes
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from audiences import conditions, membership, population
from audiences.definitions import CONTROL, Audience, Definitions
from audiences.membership import Decision, Previous, Why
from audiences.population import Population, Snapshot, Times
from service.core import movement
from service.core.bundle import Bundle
from service.core.errors import PropensityError
from service.core.movement import State
from service.core.segments import SEGMENTS

# Visitors that are read or written together.
PAGE: Final = 10_000
_MOST_AHEAD_MS: Final = 24 * 3_600_000

Report = Callable[[str, float], None]


class StaleScores(PropensityError):
    """Scores that are older than those that the lists were last refreshed with."""


class EarlyScores(PropensityError):
    """Scores of a moment to come, up to which all others would be refused."""


class Page(Protocol):
    """Some members, and where the next ones begin; None at the end."""

    @property
    def items(self) -> Sequence[Any]:
        """Each with a visitor_id and entered_ms."""

    @property
    def cursor(self) -> str | None:
        """What the next page is asked with."""


class Lists(Protocol):
    """Where members are kept; `service.members.Members` is one."""

    async def page(self, audience: str, cursor: str | None, n: int) -> Page:
        """Up to n members after a cursor."""

    async def change(
        self, audience: str, entered: Mapping[str, int], left: Sequence[str], at_ms: int, why: str
    ) -> None:
        """Let visitors enter and leave; the same again changes nothing."""

    async def erased(self, ids: Sequence[str]) -> Collection[str]:
        """Those of the visitors who were erased and have not come back."""

    async def names(self) -> Sequence[Any]:
        """What is known of each audience: its name, size and described_ms."""

    async def describe(self, audience: str, definition_json: str, at_ms: int) -> None:
        """Say what an audience is."""


class Scores(Protocol):
    """Where scores and segments are kept; `service.propensities.Propensities` is one."""

    async def put(
        self, model: str, version: str, ids: Sequence[str], propensity: npt.NDArray[np.float32], at_ms: int
    ) -> None:
        """Take scores, of which the latest of each visitor counts."""

    async def segments(self, model: str, ids: Sequence[str]) -> Sequence[tuple[str, int] | None]:
        """The segment of each visitor, and since when."""

    async def move(self, model: str, moves: Mapping[str, str], at_ms: int) -> None:
        """Put visitors into segments; the same again changes nothing."""


class Moved(NamedTuple):
    """How many visitors of a model are in each segment, and how many came there from another one."""

    sizes: Mapping[str, int]
    moved: int
    new: int


@dataclass(frozen=True)
class Refreshed:
    """What became of one audience. Counts of visitors; `gone` have no score any more."""

    audience: Audience
    qualified: int
    members: int
    control: int
    entered: int
    left: Mapping[str, int]  # by reason
    too_small: bool
    cut_off: float

    @property
    def operations(self) -> int:
        """What the list's copies have to be told."""
        return self.entered + sum(self.left.values())


@dataclass(frozen=True)
class Outcome:
    """What a refresh did."""

    at_ms: int
    visitors: int
    segments: Mapping[str, Moved]
    audiences: Sequence[Refreshed]
    unknown: Sequence[str] = field(default_factory=tuple)  # lists that the definitions do not name


class Stored(NamedTuple):
    """What the lists hold of an audience, in the order of a population; `gone` are not in the population."""

    previous: Previous
    gone: Sequence[str]
    gone_control: Sequence[str]


def moment(snapshots: Sequence[Snapshot]) -> int:
    """The moment that snapshots are decided for: that of the latest, in milliseconds since 1970."""
    return max(one.at_ms for one in snapshots)


def require_begun(now_ms: int, clock_ms: int) -> None:
    """Raise EarlyScores where scores are of a moment that is more than a day ahead of the clock."""
    if now_ms > clock_ms + _MOST_AHEAD_MS:
        raise EarlyScores(
            f"the scores are of {iso(now_ms)}, and older ones would be refused until then; score with --at now"
        )


async def refresh(
    definitions: Definitions,
    snapshots: Sequence[Snapshot],
    bundles: Mapping[str, Bundle],
    members: Lists,
    scores: Scores,
    now_ms: int,
    report: Report = lambda stage, share: None,
) -> Outcome:
    """Write who is where at `now_ms`: scores, segments, then audience after audience.

    bundles: the scored version of each model. Raises InvalidDefinitions, UnreadableScores, StaleScores.
    """
    known = await members.names()
    _require_newer(known, definitions, now_ms)
    report("Reading scores", 0)
    everyone = await read(definitions, snapshots, bundles, members)
    for one in snapshots:
        await _put(scores, one, everyone, report)
    segments = {}
    for model in bundles:
        before = await stored_segments(scores, model, everyone, lambda share: report("Moving visitors", share))
        everyone, moves = moved(definitions, bundles[model], everyone, before, now_ms)
        await _move(scores, model, everyone, moves, now_ms)
        segments[model] = _movement(everyone, model, before, moves)
    done, described = [], described_in(known)
    for place, audience in enumerate(definitions.ordered):
        report("Refreshing audiences", place / len(definitions.ordered))
        stored = await read_stored(members, audience, everyone, described)
        decision = membership.decide(audience, everyone, stored.previous, now_ms)
        await _write(members, audience, everyone, stored, decision, now_ms)
        everyone = everyone.with_audience(audience.name, decision.qualified)
        found = summary(audience, stored, decision)
        await _describe(members, found, snapshots, now_ms)
        done.append(found)
    return Outcome(now_ms, len(everyone), segments, done, unnamed(known, definitions))


def unnamed(known: Sequence[Any], definitions: Definitions) -> list[str]:
    """The lists that there are although the definitions do not name them."""
    own = {name for audience in definitions.ordered for name in (audience.name, audience.control)}
    return [one.name for one in known if one.name not in own and is_kept(one)]


def is_kept(known: Any) -> bool:
    """Whether a list has members or a definition: of one that was removed only the changes are left."""
    return bool(known.size or known.described_ms)


def _require_newer(known: Sequence[Any], definitions: Definitions, now_ms: int) -> None:
    for one in known:
        if one.name in definitions.audiences and one.described_ms > now_ms:
            raise StaleScores(
                f"the scores are of {iso(now_ms)}, and {one.name} was refreshed with scores of "
                f"{iso(one.described_ms)}; give the newer ones"
            )


def iso(ms: int) -> str:
    """A moment as ISO 8601, to the second."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# --- reading ---


async def read(
    definitions: Definitions, snapshots: Sequence[Snapshot], bundles: Mapping[str, Bundle], members: Lists
) -> Population:
    """Everyone, without segments, once it is sure that the models have what the definitions look at.

    Who was erased after the scores were made is none of them, and takes nobody's place.
    """
    population.require_apart(snapshots)
    specs = {name: bundle.spec for name, bundle in bundles.items()}
    definitions.check(specs)
    everyone = population.load(snapshots, specs, {name: definitions.features(name) for name in bundles})
    erased: list[str] = []
    for part in _pages(np.arange(len(everyone))):
        erased += await members.erased(everyone.ids.take(pa.array(part)).to_pylist())
    if not erased:
        return everyone
    kept = np.ones(len(everyone), np.bool_)
    kept[everyone.places(erased)] = False
    return everyone.at(kept)


async def stored_segments(
    scores: Scores, model: str, everyone: Population, report: Callable[[float], None] = lambda share: None
) -> State:
    """Where each visitor is now; who is unknown to the model, or was put nowhere yet, is nowhere."""
    state = movement.nowhere(len(everyone))
    places = {name: place for place, name in enumerate(SEGMENTS)}
    for part in _pages(np.flatnonzero(everyone.models[model].known)):
        report(float(part[0]) / len(everyone))
        found = await scores.segments(model, everyone.ids.take(pa.array(part)).to_pylist())
        for place, one in zip(part.tolist(), found, strict=True):
            if one is not None and one[0] in places:
                state.place[place], state.since_ms[place] = places[one[0]], one[1]
    return state


def described_in(known: Sequence[Any]) -> frozenset[str]:
    """The audiences that were refreshed to the end before: what they are is said last."""
    return frozenset(one.name for one in known if one.described_ms)


async def read_stored(members: Lists, audience: Audience, everyone: Population, described: frozenset[str]) -> Stored:
    """What the lists hold of an audience and of its hold-out."""
    entered, gone = await _list(members, audience.name, everyone)
    control, gone_control = await _list(members, audience.control, everyone)
    return Stored(Previous(entered, control, audience.name not in described), gone, gone_control)


async def _list(members: Lists, name: str, everyone: Population) -> tuple[Times, Sequence[str]]:
    ids: list[str] = []
    times: list[int] = []
    cursor: str | None = None
    while True:
        page = await members.page(name, cursor, PAGE)
        ids += [one.visitor_id for one in page.items]
        times += [one.entered_ms for one in page.items]
        cursor = page.cursor
        if cursor is None:
            break
    found = np.zeros(len(everyone), np.int64)
    places = everyone.places(ids)
    here = places >= 0
    found[places[here]] = np.array(times, np.int64)[here]
    return found, [ids[place] for place in np.flatnonzero(~here)]


# --- segments ---


def moved(
    definitions: Definitions, bundle: Bundle, everyone: Population, before: State, now_ms: int
) -> tuple[Population, npt.NDArray[np.int64]]:
    """The population with segments and micro-segments of a model, and places int64[n] of the visitors who moved."""
    rules, said = definitions.rules(bundle.name), everyone.models[bundle.name]
    known = np.flatnonzero(said.known)
    after = movement.move(
        said.propensity[known],
        bundle.cutoffs,
        State(before.place[known], before.since_ms[known]),
        now_ms,
        margin=rules.margin or 0.0,
        min_stay_ms=rules.min_stay or 0,
    )
    segment = np.full(len(everyone), -1, np.int8)
    segment[known] = after.place
    with_segments = everyone.with_model(bundle.name, replace(said, segment=segment))
    micro, names = conditions.micro_segments(rules.micro, with_segments, bundle.name)
    divided = replace(with_segments.models[bundle.name], micro=micro, micro_names=names)
    return everyone.with_model(bundle.name, divided), np.flatnonzero(segment != before.place)


def _movement(everyone: Population, model: str, before: State, moves: npt.NDArray[np.int64]) -> Moved:
    segment = everyone.models[model].segment
    assert segment is not None
    counts = np.bincount(segment[segment >= 0], minlength=len(SEGMENTS)).tolist()
    new = int((before.place[moves] < 0).sum())
    return Moved(dict(zip(SEGMENTS, counts, strict=True)), len(moves) - new, new)


async def _move(scores: Scores, model: str, everyone: Population, moves: npt.NDArray[np.int64], now_ms: int) -> None:
    segment = everyone.models[model].segment
    assert segment is not None
    for part in _pages(moves):
        ids = everyone.ids.take(pa.array(part)).to_pylist()
        names = [SEGMENTS[place] for place in segment[part].tolist()]
        await scores.move(model, dict(zip(ids, names, strict=True)), now_ms)


async def _put(scores: Scores, snapshot: Snapshot, everyone: Population, report: Report) -> None:
    said = everyone.models[snapshot.model]
    for part in _pages(np.flatnonzero(said.known)):
        report("Writing scores", float(part[0]) / len(everyone))
        ids = everyone.ids.take(pa.array(part)).to_pylist()
        await scores.put(snapshot.model, snapshot.version, ids, said.propensity[part], snapshot.at_ms)


def _pages(places: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    for first in range(0, len(places), PAGE):
        yield places[first : first + PAGE]


# --- writing ---


async def _write(
    members: Lists, audience: Audience, everyone: Population, stored: Stored, decision: Decision, now_ms: int
) -> None:
    # Who leaves is told first: cut off in between, a list has too few members rather than too many.
    for why in Why:
        left = (decision.why == why) & (decision.entered_ms == 0)
        if why is not Why.UNCHANGED:
            await _leave(members, audience.name, everyone, np.flatnonzero(left), now_ms, why)
    for part in _pages(np.arange(len(stored.gone))):
        gone = [stored.gone[place] for place in part]
        await members.change(audience.name, {}, gone, now_ms, Why.GONE.text)
    entered = np.flatnonzero((stored.previous.entered_ms == 0) & (decision.entered_ms > 0))
    await _enter(members, audience.name, everyone, entered, now_ms)
    if audience.holdout is not None or (stored.previous.control_ms > 0).any() or stored.gone_control:
        left = np.flatnonzero((stored.previous.control_ms > 0) & (decision.control_ms == 0))
        await _leave(members, audience.control, everyone, left, now_ms, Why.SCORE)
        for part in _pages(np.arange(len(stored.gone_control))):
            gone = [stored.gone_control[place] for place in part]
            await members.change(audience.control, {}, gone, now_ms, Why.GONE.text)
        entered = np.flatnonzero((stored.previous.control_ms == 0) & (decision.control_ms > 0))
        await _enter(members, audience.control, everyone, entered, now_ms)


async def _leave(
    members: Lists, name: str, everyone: Population, places: npt.NDArray[np.int64], now_ms: int, why: Why
) -> None:
    for part in _pages(places):
        await members.change(name, {}, everyone.ids.take(pa.array(part)).to_pylist(), now_ms, why.text)


async def _enter(members: Lists, name: str, everyone: Population, places: npt.NDArray[np.int64], now_ms: int) -> None:
    for part in _pages(places):
        entered = dict.fromkeys(everyone.ids.take(pa.array(part)).to_pylist(), now_ms)
        await members.change(name, entered, [], now_ms, Why.QUALIFIES.text)


def summary(audience: Audience, stored: Stored, decision: Decision) -> Refreshed:
    """What a decision changes of what the lists hold."""
    left = {why.text: int(((decision.why == why) & (decision.entered_ms == 0)).sum()) for why in Why if why > 1}
    left[Why.GONE.text] += len(stored.gone)
    return Refreshed(
        audience=audience,
        qualified=int(decision.qualified.sum()),
        members=int((decision.entered_ms > 0).sum()),
        control=int((decision.control_ms > 0).sum()),
        entered=int((decision.why == Why.QUALIFIES).sum()),
        left={why: count for why, count in left.items() if count},
        too_small=decision.too_small,
        cut_off=decision.cut_off,
    )


async def _describe(members: Lists, found: Refreshed, snapshots: Sequence[Snapshot], now_ms: int) -> None:
    audience = found.audience
    scored = {one.model: one.version for one in snapshots}
    refreshed = {"at": iso(now_ms), "versions": scored, "qualified": found.qualified, "too_small": found.too_small}
    written = json.loads(audience.written())
    await members.describe(audience.name, json.dumps({**written, "refreshed": refreshed}), now_ms)
    if audience.holdout is not None:
        control = {"control_of": audience.name, "holdout": written["holdout"], "refreshed": refreshed}
        await members.describe(audience.control, json.dumps(control), now_ms)


def is_control(name: str) -> bool:
    """Whether a list is the hold-out of an audience."""
    return name.endswith(CONTROL)
