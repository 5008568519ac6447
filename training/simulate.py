"""The simulated shop: visitors with hidden intent, their events as a file, the true propensity of each event.

A visitor's sessions are a Poisson process; its rate is the visitor's own, times the hour of day, the day of
week and running campaigns, and is higher while the visitor is in the market (hidden episodes). Some sessions
are missions: only they can end in an order. Inside a session every step leaves the current state with a fixed
probability: browsing ends with a cart or with leaving; a filled cart ends with an order or with leaving. For
`SATIATION_DAYS` after an order new sessions are missions only `SATIATION` times as often. So, with everything
hidden known, the chance of at least one order in (t, t + horizon] is

    1 - (1 - BROWSING_BUYS)^b (1 - CARTED_BUYS)^c exp(-K)

where b and c count the missions open at t without and with a cart, and K is the number of orders expected of
sessions that start in the horizon. K ends one mean time to order before the horizon does, for a session that
starts later orders too late; what is left of that edge is of second order (minutes against days). Sessions of
one visitor may overlap (two tabs); the formula holds for them as it stands.

"Everything hidden" includes when the visitor's coming episodes begin and end, so no model of the events can
rank as well as the truth does; but where a calibrated model says 0.1, the truth is 0.1 in the mean.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from service.core.errors import PropensityError
from training.shopfiles import (
    CART,
    CATEGORIES,
    DEVICES,
    IDENTIFY,
    ORDER,
    REFERRERS,
    ROW,
    Codes,
    Flags,
    Floats,
    Origin,
    Rows,
    ending_of,
    event_writer,
    truth_writer,
)

Integers = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]

SECOND_MS: Final = 1000
HOUR_MS: Final = 3600 * SECOND_MS
DAY_MS: Final = 24 * HOUR_MS

# Shares of sessions by UTC hour and by day from Monday; only their proportions matter.
HOURS: Final = (18, 11, 7, 5, 5, 8, 14, 24, 34, 42, 47, 50, 53, 51, 48, 47, 49, 55, 66, 79, 88, 84, 62, 36)
WEEKDAYS: Final = (95, 92, 90, 94, 100, 118, 130)

# Campaigns: one in every slot, in turn by e-mail (known visitors only) and by ads (everyone).
CAMPAIGN_SLOT_DAYS: Final = 10
CAMPAIGN_HOURS: Final = 48
CAMPAIGN_LIFT: Final = {"email": 2.2, "ads": 1.7}
CAMPAIGN_MISSION: Final = 0.5  # a session that a campaign caused is a mission half as often

# Sessions a day and share of missions, outside and inside the visitor's episodes in the market.
DORMANT_RATE, MARKET_RATE, BOT_RATE = 0.02, 0.30, 0.05
DORMANT_MISSION, MARKET_MISSION, MAX_MISSION = 0.010, 0.045, 0.5
MARKET_PAUSE_DAYS, MARKET_MIN_DAYS, MARKET_MEAN_DAYS = 50.0, 6.0, 14.0
NEWCOMER_IN_MARKET: Final = 0.5  # half of the newcomers come because they want something
SATIATION: Final = 0.2
SATIATION_DAYS: Final = 10

# Chances per step: on a mission, looking around, and of bots, which never fill a cart.
MISSION_CART, MISSION_LEAVE, MISSION_BUY, MISSION_ABANDON = 0.08, 0.05, 0.22, 0.16
LOOK_END, LOOK_ABANDON, BOT_LEAVE = 0.38, 0.35, 0.01
# Looking around ends with a cart in proportion to the share of missions, and never with an order.
LOOK_CART_PER_MISSION, MAX_LOOK_CART = 0.8, 0.4
CARTED_BUYS: Final = MISSION_BUY / (MISSION_BUY + MISSION_ABANDON)
BROWSING_BUYS: Final = MISSION_CART / (MISSION_CART + MISSION_LEAVE) * CARTED_BUYS
# Milliseconds between two steps: the least, and on top of it in the mean.
STEP_MIN_MS, STEP_PACE_MS = 1000, 40_000
BOT_STEP_MIN_MS, BOT_STEP_PACE_MS = 150, 500
ORDER_DELAY_MS: Final = (STEP_MIN_MS + STEP_PACE_MS) * (
    1 / (MISSION_CART + MISSION_LEAVE) + 1 / (MISSION_BUY + MISSION_ABANDON)
)
LOGIN: Final = 0.2  # share of a known visitor's sessions that log in; the first always does
LOGIN_AFTER_MS: Final = 400

# Shares of view, search, home and cart: landing, looking around, on a mission, with a cart, and of bots.
KIND_SHARES: Final = np.array([[35, 25, 40, 0], [56, 16, 28, 0], [74, 20, 6, 0], [70, 12, 6, 12], [100, 0, 0, 0]]) / 100
DEVICE_SHARES: Final = (0.55, 0.35, 0.10)
DEVICE_MISSION: Final = np.array([0.7, 1.5, 1.0])
REFERRER_SHARES: Final = np.array([[36, 34, 21, 9], [32, 6, 45, 17]]) / 100  # looking around; mission
CATEGORY_PRICE: Final = np.array([1.6, 0.8, 2.6, 1.9, 1.2, 1.5, 1.1, 0.4])

LATE_MIN_MS: Final = 60 * SECOND_MS  # an event delivered this long after it happened is late
LATE_MEAN_MS, LATE_MAX_MS = 3 * HOUR_MS, 3 * DAY_MS

CHUNK_VISITORS: Final = 8192
BATCH_ROWS: Final = 250_000
SPILL_FILES: Final = 256


@dataclass(frozen=True, slots=True)
class Shop:
    """What to simulate; the same shop gives the same bytes, given the same versions of numpy and pyarrow.

    Refuses with `PropensityError` what cannot be simulated. `end` is the last instant with events.
    """

    visitors: int = 20_000
    days: int = 60
    seed: int = 0
    end: datetime = datetime(2026, 7, 1, tzinfo=UTC)
    horizon_days: int = 7
    known_share: float = 0.35
    bot_share: float = 0.003
    late_share: float = 0.02
    duplicate_share: float = 0.005

    def __post_init__(self) -> None:
        if not 1 <= self.visitors <= 10_000_000:
            raise PropensityError(f"visitors is {self.visitors}; write a number from 1 to 10000000")
        if not 1 <= self.horizon_days <= 365:
            raise PropensityError(f"horizon_days is {self.horizon_days}; write a number from 1 to 365")
        if not self.horizon_days < self.days <= 1095:
            raise PropensityError(
                f"days is {self.days}; write more than the horizon of {self.horizon_days} days, so that some "
                "events have a label, and at most 1095"
            )
        if self.seed < 0:
            raise PropensityError(f"seed is {self.seed}; write 0 or a positive whole number")
        if self.end.tzinfo is None:
            raise PropensityError(f"end is {self.end} without a time zone; write it in UTC, as 2026-07-01T00:00:00Z")
        for name in ("known_share", "bot_share", "late_share", "duplicate_share"):
            if not 0 <= getattr(self, name) < 1:
                raise PropensityError(f"{name} is {getattr(self, name)}; write a share from 0 to below 1")


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written: counts of distinct events but for `rows`, which counts duplicates too."""

    events: int = 0
    rows: int = 0
    visitors: int = 0
    orders: int = 0
    bot_events: int = 0
    late: int = 0
    duplicates: int = 0
    mean_propensity: float = 0.0

    def __add__(self, other: Summary) -> Summary:
        events = self.events + other.events
        weighted = self.mean_propensity * self.events + other.mean_propensity * other.events
        return Summary(
            events=events,
            rows=self.rows + other.rows,
            visitors=self.visitors + other.visitors,
            orders=self.orders + other.orders,
            bot_events=self.bot_events + other.bot_events,
            late=self.late + other.late,
            duplicates=self.duplicates + other.duplicates,
            mean_propensity=weighted / max(events, 1),
        )


def simulate(
    shop: Shop, out: Path, truth: Path | None = None, on_progress: Progress = lambda done, total: None
) -> Summary:
    """Write the shop's events to `out`, in the order of delivery, and their true propensities to `truth`.

    `out` ends in .parquet, .ndjson or .csv, the last two also with .gz. `truth` is Parquet with one row a
    distinct event, by visitor and time: visitor_id (string), at_ms (int64, epoch) and propensity (float64,
    [0, 1]), the chance of an order in (at_ms, at_ms + horizon] right after that event. Neither file appears
    before it is complete. `on_progress(done, total)` is called after each part of the work.
    """
    ending = ending_of(out, truth)
    calendar = _calendar(shop)
    origin = Origin(calendar.origin_ms, shop.seed, calendar.campaigns)
    starts = range(0, shop.visitors, CHUNK_VISITORS)
    spills = min(max(round(_events_per_visitor(shop) * shop.visitors / BATCH_ROWS), 1), SPILL_FILES)
    total = len(starts) + spills
    summary = Summary()
    for path in filter(None, (out, truth)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".simulate-") as name, ExitStack() as stack:
        folder = Path(name)
        write = stack.enter_context(event_writer(ending, folder / "events", origin))
        keep = stack.enter_context(truth_writer(truth and folder / "truth", origin))
        for done, first in enumerate(starts, 1):
            rng = np.random.default_rng([shop.seed, 1, first])
            visitors = _visitors(calendar, rng, first, min(CHUNK_VISITORS, shop.visitors - first))
            rows, propensity = _history(calendar, visitors, rng, summary.events)
            keep(rows, propensity)
            delivered = _deliver(shop, rows, rng)
            _spill(delivered, folder, (shop.days + 5) * DAY_MS / spills, spills)
            summary += _count(visitors, rows, propensity, delivered)
            on_progress(done, total)
        for index in range(spills):
            rows = _read_spill(folder / f"{index}.rows")
            if len(rows):
                write(rows)
            on_progress(len(starts) + index + 1, total)
        stack.close()
        (folder / "events").replace(out)
        if truth is not None:
            shutil.move(folder / "truth", truth)  # may be on another disk
    return summary


def sized(shop: Shop, events: int) -> Shop:
    """The same shop with as many visitors as give about `events` rows: within 5 % from 200,000 rows on."""
    if events < 1:
        raise PropensityError(f"events is {events}; write a positive number")
    return replace(shop, visitors=max(round(events / _events_per_visitor(shop)), 1))


# --- the calendar: everything that is the same for all visitors ---


@dataclass(frozen=True, slots=True)
class _Calendar:
    """Times are milliseconds since `origin_ms`, a full hour. Curves: a row for anonymous, one for known."""

    shop: Shop
    origin_ms: int
    start: int
    end: int
    horizon: int
    sessions: Floats  # [2, H + 1], in milliseconds of average traffic
    missions: Floats  # the same, but sessions from campaigns count as `CAMPAIGN_MISSION`
    lift: Floats  # [2, H]
    campaign: Codes  # [H]: 0 for none, else 1 + the index in campaigns
    campaigns: tuple[str, ...]

    @property
    def stop(self) -> int:
        return self.end + self.horizon

    @property
    def span(self) -> int:
        """Longer than any time, so that visitor * span + time orders events by visitor, then time."""
        return self.stop + 30 * DAY_MS


def _calendar(shop: Shop) -> _Calendar:
    end_ms = (shop.end - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    start_ms = end_ms - shop.days * DAY_MS
    origin_ms = start_ms // HOUR_MS * HOUR_MS
    hours = (shop.days + shop.horizon_days) * 24 + 2
    hour = origin_ms // HOUR_MS + np.arange(hours)
    of_day, of_week = np.array(HOURS) / np.mean(HOURS), np.array(WEEKDAYS) / np.mean(WEEKDAYS)
    season = of_day[hour % 24] * of_week[(hour // 24 + 3) % 7]  # 1970-01-01 was a Thursday
    campaign, names = _campaigns(hours, np.random.default_rng([shop.seed, 0]))
    by_channel = {channel: np.zeros(len(names) + 1, bool) for channel in CAMPAIGN_LIFT}
    for index, name in enumerate(names, 1):
        by_channel[name.split("_")[0]][index] = True
    lift = np.ones((2, hours))
    lift[:, by_channel["ads"][campaign]] = CAMPAIGN_LIFT["ads"]
    lift[1, by_channel["email"][campaign]] = CAMPAIGN_LIFT["email"]
    return _Calendar(
        shop=shop,
        origin_ms=origin_ms,
        start=start_ms - origin_ms,
        end=end_ms - origin_ms,
        horizon=shop.horizon_days * DAY_MS,
        sessions=_cumulative(season * lift),
        missions=_cumulative(season * (1 + (lift - 1) * CAMPAIGN_MISSION)),
        lift=lift,
        campaign=campaign,
        campaigns=names,
    )


def _campaigns(hours: int, rng: np.random.Generator) -> tuple[Codes, tuple[str, ...]]:
    slot = CAMPAIGN_SLOT_DAYS * 24
    campaign = np.zeros(hours, np.uint8)
    names = []
    for index in range(hours // slot + 1):
        begin = index * slot + int(rng.integers(slot - CAMPAIGN_HOURS))
        campaign[begin : begin + CAMPAIGN_HOURS] = index + 1
        names.append(f"{('email', 'ads')[index % 2]}_{index // 2 + 1}")
    return campaign, tuple(names)


def _cumulative(rate: Floats) -> Floats:
    return np.concatenate([np.zeros((2, 1)), np.cumsum(rate * HOUR_MS, axis=1)], axis=1)


def _at(curves: Floats, known: Flags, time: Floats) -> Floats:
    """The cumulative curve of each visitor's class at `time`, linear inside an hour."""
    hour = (time // HOUR_MS).astype(np.int64)
    row = known.astype(np.int64)
    low = curves[row, hour]
    value: Floats = low + (curves[row, hour + 1] - low) * (time / HOUR_MS - hour)
    return value


def _inverse(curves: Floats, known: Flags, value: Floats) -> Floats:
    edges = np.arange(curves.shape[1]) * float(HOUR_MS)
    anonymous, of_known = (np.interp(value, curve, edges) for curve in curves)
    time: Floats = np.where(known, of_known, anonymous)
    return time


# --- visitors ---


@dataclass(frozen=True, slots=True)
class _Visitors:
    """V visitors; each has S stretches of time, in turn outside and in the market, between S + 1 edges."""

    first: int
    known: Flags
    bot: Flags
    device: Codes
    category: Codes
    taste: Floats
    tier: Codes
    past_orders: Integers
    edges: Floats  # [V, S + 1]
    rate: Floats  # [V, S] sessions per millisecond of average traffic
    mission: Floats  # [V, S] share of missions among sessions that no campaign caused


def _visitors(calendar: _Calendar, rng: np.random.Generator, first: int, count: int) -> _Visitors:
    shop = calendar.shop
    bot = rng.random(count) < shop.bot_share
    known = ~bot & (rng.random(count) < shop.known_share)
    device = rng.choice(len(DEVICES), count, p=DEVICE_SHARES).astype(np.uint8)
    affinity = rng.lognormal(-0.5, 1.0, count)
    activity = rng.gamma(1.2, 1 / 1.2, count) * np.where(known, 1.3, 0.85)
    taste = rng.lognormal(3.3, 0.5, count)
    edges = _edges(calendar, rng, count)
    market = np.arange(edges.shape[1] - 1) % 2 == 1
    rate = activity[:, None] * np.where(market, MARKET_RATE, DORMANT_RATE) / DAY_MS
    rate[bot] = BOT_RATE / DAY_MS
    keenness = affinity * np.where(known, 1.3, 0.9) * DEVICE_MISSION[device] * (taste / 27) ** -0.5
    mission = np.minimum(keenness[:, None] * np.where(market, MARKET_MISSION, DORMANT_MISSION), MAX_MISSION)
    mission[bot] = 0
    standing = affinity * activity * rng.lognormal(0, 0.3, count)
    return _Visitors(
        first=first,
        known=known,
        bot=bot,
        device=device,
        category=rng.integers(len(CATEGORIES), size=count, dtype=np.uint8),
        taste=taste,
        tier=np.searchsorted([0.5, 1.2, 2.8], standing).astype(np.uint8),
        past_orders=rng.poisson(standing * 2),
        edges=edges,
        rate=rate,
        mission=mission,
    )


def _edges(calendar: _Calendar, rng: np.random.Generator, count: int) -> Floats:
    """Start of each visitor's life, begin and end of each episode in the market, and the end of time."""
    episodes = 3 + int(calendar.stop / DAY_MS / 20)
    newcomer = rng.random(count) < 0.5
    start = np.where(newcomer, rng.uniform(calendar.start, calendar.end, count), calendar.start)
    pause = rng.exponential(MARKET_PAUSE_DAYS, (count, episodes))
    already = MARKET_MEAN_DAYS / (MARKET_MEAN_DAYS + MARKET_PAUSE_DAYS)
    pause[:, 0] *= rng.random(count) >= np.where(newcomer, NEWCOMER_IN_MARKET, already)
    length = MARKET_MIN_DAYS + rng.exponential(MARKET_MEAN_DAYS - MARKET_MIN_DAYS, (count, episodes))
    steps = np.stack([pause, length], axis=2).reshape(count, 2 * episodes) * DAY_MS
    edges = start[:, None] + np.concatenate([np.zeros((count, 1)), np.cumsum(steps, axis=1)], axis=1)
    edges = np.concatenate([edges, np.full((count, 1), np.inf)], axis=1)
    clipped: Floats = np.minimum(edges, calendar.stop)
    return clipped


def _events_per_visitor(shop: Shop) -> float:
    """Expected rows per visitor, duplicates included: the model's means over a sample of visitors."""
    calendar = _calendar(shop)
    rng = np.random.default_rng([shop.seed, 2])
    visitors = _visitors(calendar, rng, 0, 50_000)
    edges = np.minimum(visitors.edges, calendar.end)
    known = np.broadcast_to(visitors.known[:, None], edges.shape)
    sessions = visitors.rate * np.diff(_at(calendar.sessions, known, edges), axis=1)
    missions = visitors.rate * visitors.mission * np.diff(_at(calendar.missions, known, edges), axis=1)
    expected, wanted = sessions.sum(axis=1), missions.sum(axis=1)
    idle = sessions * (1 - visitors.mission) * _look_cart(visitors.mission) / LOOK_ABANDON
    look = 1 / LOOK_END
    buy = 1 / (MISSION_CART + MISSION_LEAVE) * (1 + MISSION_CART / (MISSION_BUY + MISSION_ABANDON)) + BROWSING_BUYS
    logins = visitors.known * (LOGIN * expected - (1 - LOGIN) * np.expm1(-expected))
    events = np.where(
        visitors.bot,
        expected / BOT_LEAVE,
        expected * look + wanted * (buy - look) + idle.sum(axis=1) + logins,
    )
    return float(events.mean()) * (1 + shop.duplicate_share)


# --- sessions ---


@dataclass(slots=True)
class _Sessions:
    """N sessions by visitor and start. Step `browse` fills the cart, if one does; step `steps` is the end."""

    visitor: Integers
    start: Floats
    campaign: Codes
    mission: Flags
    browse: Integers
    after: Integers  # steps from the cart on; 0 without one
    orders: Flags
    length: Floats  # milliseconds until step `steps`

    @property
    def steps(self) -> Integers:
        return self.browse + self.after


def _sessions(calendar: _Calendar, visitors: _Visitors, rng: np.random.Generator) -> _Sessions:
    cell, start = _arrivals(calendar, visitors, rng)
    visitor = cell // visitors.rate.shape[1]
    hour = (start // HOUR_MS).astype(np.int64)
    lift = calendar.lift[visitors.known[visitor].astype(np.int64), hour]
    caused = rng.random(len(start)) < (lift - 1) / lift
    chance = visitors.mission.ravel()[cell] * np.where(caused, CAMPAIGN_MISSION, 1)
    draw = rng.random(len(start))
    sessions = _Sessions(
        visitor,
        start,
        np.where(caused, calendar.campaign[hour], 0).astype(np.uint8),
        draw < chance,
        *_walk(rng, draw < chance, visitors.bot[visitor], chance),
    )
    _satiate(sessions, chance, draw < chance * SATIATION, calendar.span, rng)
    return sessions


def _arrivals(calendar: _Calendar, visitors: _Visitors, rng: np.random.Generator) -> tuple[Integers, Floats]:
    """Stretch (index into [V, S]) and start of every session up to the end, by visitor and start."""
    edges = np.minimum(visitors.edges, calendar.end)
    traffic = _at(calendar.sessions, np.broadcast_to(visitors.known[:, None], edges.shape), edges)
    width = np.diff(traffic, axis=1)
    counts = rng.poisson(visitors.rate * width).ravel()
    cell = np.repeat(np.arange(counts.size), counts)
    places = traffic[:, :-1].ravel()[cell] + rng.random(len(cell)) * width.ravel()[cell]
    start = _inverse(calendar.sessions, visitors.known[cell // width.shape[1]], places)
    order = np.lexsort((start, cell))
    return cell[order], start[order]


def _walk(
    rng: np.random.Generator, mission: Flags, bot: Flags, chance: Floats
) -> tuple[Integers, Integers, Flags, Floats]:
    """Browse steps, steps from the cart on, whether it ends in an order, milliseconds until it ends."""
    count = len(mission)
    leave = np.where(bot, BOT_LEAVE, np.where(mission, MISSION_CART + MISSION_LEAVE, LOOK_END))
    browse = rng.geometric(leave)
    fills = np.where(mission, MISSION_CART / (MISSION_CART + MISSION_LEAVE), _look_cart(chance))
    carted = rng.random(count) < fills
    after = carted * rng.geometric(np.where(mission, MISSION_BUY + MISSION_ABANDON, LOOK_ABANDON))
    orders = carted & mission & (rng.random(count) < CARTED_BUYS)
    pace = rng.lognormal(-0.125, 0.5, count) * np.where(bot, BOT_STEP_PACE_MS, STEP_PACE_MS)
    steps = browse + after
    length = steps * np.where(bot, BOT_STEP_MIN_MS, STEP_MIN_MS) + rng.standard_gamma(steps) * pace
    return browse, after, orders, length


def _look_cart(mission: Floats) -> Floats:
    return np.minimum(mission * LOOK_CART_PER_MISSION, MAX_LOOK_CART)


def _satiate(sessions: _Sessions, chance: Floats, strong: Flags, span: int, rng: np.random.Generator) -> None:
    """Turn missions soon after an order into looking around; the `strong` ones withstand."""
    buyers = np.flatnonzero(sessions.orders)
    visitor, start = sessions.visitor[buyers], sessions.start[buyers]
    finish = start + sessions.length[buyers]
    bought = _kept_orders(visitor, start, finish, strong[buyers])
    order_keys = np.sort(visitor[bought] * float(span) + finish[bought])
    begin = sessions.visitor * float(span) + sessions.start
    last = np.concatenate([[-np.inf], order_keys])[np.searchsorted(order_keys, begin, side="right")]
    sated = (last >= sessions.visitor * float(span)) & (begin - last < SATIATION_DAYS * DAY_MS)
    weak = np.flatnonzero(sessions.mission & ~strong & sated)
    sessions.mission[weak] = False
    looking = np.zeros(len(weak), bool)
    browse, after, orders, length = _walk(rng, looking, looking, chance[weak])
    sessions.browse[weak], sessions.after[weak] = browse, after
    sessions.orders[weak], sessions.length[weak] = orders, length


def _kept_orders(visitor: Integers, start: Floats, finish: Floats, strong: Flags) -> Flags:
    """Which of the possible orders happen: a weak one only with none in the days before its session."""
    kept = np.zeros(len(visitor), bool)
    rank = np.arange(len(visitor)) - np.searchsorted(visitor, visitor)
    recent = np.full((int(visitor.max(initial=-1)) + 1, 2), -np.inf)  # two: the newest may still be to come
    for turn in range(int(rank.max(initial=-1)) + 1):  # one turn for all visitors' n-th possible order
        now = np.flatnonzero(rank == turn)
        age = start[now, None] - recent[visitor[now]]
        sated = ((age >= 0) & (age < SATIATION_DAYS * DAY_MS)).any(axis=1)
        happens = now[strong[now] | ~sated]
        kept[happens] = True
        recent[visitor[happens], 1] = recent[visitor[happens], 0]
        recent[visitor[happens], 0] = finish[happens]
    return kept


# --- events and their truth ---


@dataclass(slots=True)
class _Events:
    """E events by visitor and time. `key` is visitor * span + time; no two are equal."""

    session: Integers
    visitor: Integers
    step: Integers
    login: Flags
    key: Integers
    kind: Codes


def _history(
    calendar: _Calendar, visitors: _Visitors, rng: np.random.Generator, first_message: int
) -> tuple[Rows, Floats]:
    """Every event of these visitors up to the end, by visitor and time, and the propensity after each."""
    sessions = _sessions(calendar, visitors, rng)
    events = _events(calendar, visitors, sessions, rng)
    rows = np.zeros(len(events.key), ROW)
    rows["at"] = events.key - events.visitor * calendar.span
    rows["visitor"] = visitors.first + events.visitor
    rows["kind"] = events.kind
    rows["known"] = visitors.known[events.visitor]
    rows["value"], rows["attribute"] = _content(visitors, sessions, events, rng)
    rows["campaign"] = sessions.campaign[events.session]
    for name, per_session in _context(calendar, visitors, sessions, rng).items():
        rows[name] = per_session[events.session]
    inside = rows["at"] <= calendar.end
    rows, propensity = rows[inside], _propensity(calendar, visitors, sessions, events)[inside]
    rows["message"] = np.arange(first_message, first_message + len(rows))
    return rows, propensity


def _events(calendar: _Calendar, visitors: _Visitors, sessions: _Sessions, rng: np.random.Generator) -> _Events:
    opening = np.diff(sessions.visitor, prepend=-1) > 0
    logs_in = visitors.known[sessions.visitor] & (opening | (rng.random(len(opening)) < LOGIN))
    emitted = sessions.steps + sessions.orders + logs_in
    session = np.repeat(np.arange(len(emitted)), emitted)
    position = np.arange(len(session)) - np.repeat(np.cumsum(emitted) - emitted, emitted)
    login = logs_in[session] & (position == 1)
    step = position - (logs_in[session] & (position >= 1))
    time = _times(visitors, sessions, session, step, rng) + login * LOGIN_AFTER_MS
    visitor = sessions.visitor[session]
    key = visitor * calendar.span + time.astype(np.int64)
    order = np.argsort(key, kind="stable")  # nearly sorted: only sessions that overlap are out of order
    session, visitor, step, key = (each[order] for each in (session, visitor, step, key))
    login = login[order]
    kind = _kinds(visitors, sessions, session, step, rng)
    kind[login] = IDENTIFY
    return _Events(session, visitor, step, login, _distinct(key), kind)


def _times(
    visitors: _Visitors, sessions: _Sessions, session: Integers, step: Integers, rng: np.random.Generator
) -> Floats:
    """When each step happens: exponential waiting times that add up to the session's length."""
    steps = sessions.steps
    waited = np.concatenate([[0.0], np.cumsum(rng.standard_exponential(int(steps.sum())))])
    first = np.cumsum(steps) - steps
    least = np.where(visitors.bot[sessions.visitor], BOT_STEP_MIN_MS, STEP_MIN_MS)
    scale = (sessions.length - steps * least) / (waited[first + steps] - waited[first])
    after = (waited[first[session] + step] - waited[first][session]) * scale[session]
    time: Floats = sessions.start[session] + step * least[session] + after
    return time


def _distinct(key: Integers) -> Integers:
    """Sorted keys with ties moved on by a millisecond: a visitor's events never share one."""
    while (tied := np.flatnonzero(key[1:] <= key[:-1])).size:
        key[tied + 1] = key[tied] + 1
    return key


def _kinds(
    visitors: _Visitors, sessions: _Sessions, session: Integers, step: Integers, rng: np.random.Generator
) -> Codes:
    browsing = 1 + sessions.mission[session]
    state = np.where(step == 0, 0, np.where(step < sessions.browse[session], browsing, 3))
    state[visitors.bot[sessions.visitor[session]]] = 4
    limits = np.cumsum(KIND_SHARES, axis=1)[state, :-1]
    kind: Codes = (rng.random(len(session))[:, None] >= limits).sum(axis=1).astype(np.uint8)
    kind[step == sessions.browse[session]] = CART
    kind[step == sessions.steps[session]] = ORDER
    return kind


def _content(
    visitors: _Visitors, sessions: _Sessions, events: _Events, rng: np.random.Generator
) -> tuple[Integers, Codes]:
    """Price and category of what was seen or added, the sum of an order, the traits of an identify."""
    count, mission = len(events.key), sessions.mission[events.session]
    elsewhere = rng.random(count) >= np.where(mission, 0.85, 0.6)
    other = rng.integers(len(CATEGORIES), size=count, dtype=np.uint8)
    category = np.where(elsewhere, other, visitors.category[events.visitor])
    spread = np.exp(rng.standard_normal(count) * np.where(mission, 0.2, 0.4))
    value = np.rint(100 * visitors.taste[events.visitor] * CATEGORY_PRICE[category] * spread)
    added, ordered = events.kind == CART, events.kind == ORDER
    basket = np.bincount(events.session[added], value[added], len(sessions.visitor))
    value[ordered] = basket[events.session[ordered]]
    value[events.login] = visitors.past_orders[events.visitor[events.login]]
    return value.astype(np.int64), np.where(events.login, visitors.tier[events.visitor], category)


def _context(
    calendar: _Calendar, visitors: _Visitors, sessions: _Sessions, rng: np.random.Generator
) -> dict[str, Integers]:
    """The device and the way in of each session."""
    count = len(sessions.visitor)
    borrowed = rng.random(count) < 0.15
    device = np.where(borrowed, rng.integers(len(DEVICES), size=count), visitors.device[sessions.visitor])
    limits = np.cumsum(REFERRER_SHARES, axis=1)[sessions.mission.astype(np.int64), :-1]
    referrer = (rng.random(count)[:, None] >= limits).sum(axis=1)
    referrer[visitors.bot[sessions.visitor]] = REFERRERS.index("direct")
    channel = np.array([0, *(REFERRERS.index(name.split("_")[0]) for name in calendar.campaigns)])
    return {
        "device": device,
        "referrer": np.where(sessions.campaign > 0, channel[sessions.campaign], referrer),
    }


def _propensity(calendar: _Calendar, visitors: _Visitors, sessions: _Sessions, events: _Events) -> Floats:
    """The module's formula right after each event: float64[E] in [0, 1]."""
    mission = sessions.mission[events.session]
    landed = mission & (events.step == 0) & ~events.login
    carted = mission & (events.step == sessions.browse[events.session])
    ordered = events.kind == ORDER
    left = sessions.mission & ~sessions.orders
    ends = sessions.visitor * calendar.span + (sessions.start + sessions.length).astype(np.int64)
    left_browsing = _passed(ends[left & (sessions.after == 0)], events.key)
    left_carted = _passed(ends[left & (sessions.after > 0)], events.key)
    browsing = np.cumsum(landed) - np.cumsum(carted) - left_browsing
    filled = np.cumsum(carted) - np.cumsum(ordered) - left_carted
    expected = _expected_orders(calendar, visitors, events)
    propensity: Floats = -np.expm1(browsing * np.log1p(-BROWSING_BUYS) + filled * np.log1p(-CARTED_BUYS) - expected)
    return propensity


def _passed(ends: Integers, key: Integers) -> Integers:
    return np.searchsorted(np.sort(ends), key, side="right").astype(np.int64)


def _expected_orders(calendar: _Calendar, visitors: _Visitors, events: _Events) -> Floats:
    """K of the formula for each event: orders expected of sessions yet to start, until the first."""
    curve = _order_curve(calendar, visitors)
    origin = events.visitor * calendar.span
    now = (events.key - origin).astype(np.float64)
    until = now + calendar.horizon - ORDER_DELAY_MS
    here = curve(events.visitor, now)
    expected = curve(events.visitor, until) - here
    last = np.maximum.accumulate(np.where(events.kind == ORDER, events.key, -1)) - origin
    wakes = np.minimum(last + SATIATION_DAYS * DAY_MS, until)
    sated = np.flatnonzero((last >= 0) & (wakes > now))
    expected[sated] -= (1 - SATIATION) * (curve(events.visitor[sated], wakes[sated]) - here[sated])
    return expected


def _order_curve(calendar: _Calendar, visitors: _Visitors) -> Callable[[Integers, Floats], Floats]:
    """Expected orders from sessions started by a time, per visitor, without satiation."""
    width = visitors.edges.shape[1]
    known = np.broadcast_to(visitors.known[:, None], visitors.edges.shape)
    traffic = _at(calendar.missions, known, visitors.edges)
    slope = visitors.rate * visitors.mission * BROWSING_BUYS
    begun = np.zeros_like(visitors.edges)
    np.cumsum(slope * np.diff(traffic, axis=1), axis=1, out=begun[:, 1:])
    keys = (np.arange(len(visitors.edges))[:, None] * float(calendar.span) + visitors.edges).ravel()

    def curve(visitor: Integers, time: Floats) -> Floats:
        place = np.searchsorted(keys, visitor * float(calendar.span) + time, side="right") - 1
        stretch = np.clip(place - visitor * width, 0, width - 2)
        gained = _at(calendar.missions, visitors.known[visitor], time) - traffic[visitor, stretch]
        orders: Floats = begun[visitor, stretch] + slope[visitor, stretch] * gained
        return orders

    return curve


# --- delivery ---


def _deliver(shop: Shop, rows: Rows, rng: np.random.Generator) -> Rows:
    """The rows with the time each is received; some late, some twice."""
    count = len(rows)
    delay = 50 + np.minimum(rng.exponential(300, count), 5 * SECOND_MS)
    late = rng.random(count) < shop.late_share
    late_delay = LATE_MIN_MS + np.minimum(rng.exponential(LATE_MEAN_MS, count), LATE_MAX_MS)
    rows["received"] = rows["at"] + np.where(late, late_delay, delay).astype(np.int64)
    again = rows[rng.random(count) < shop.duplicate_share]
    again["received"] += (SECOND_MS + rng.exponential(10 * 60 * SECOND_MS, len(again))).astype(np.int64)
    return np.concatenate([rows, again])


def _count(visitors: _Visitors, rows: Rows, propensity: Floats, delivered: Rows) -> Summary:
    late = rows["received"] - rows["at"] >= LATE_MIN_MS
    return Summary(
        events=len(rows),
        rows=len(delivered),
        visitors=len(np.unique(rows["visitor"])),
        orders=int((rows["kind"] == ORDER).sum()),
        bot_events=int(visitors.bot[rows["visitor"] - visitors.first].sum()),
        late=int(late.sum()),
        duplicates=len(delivered) - len(rows),
        mean_propensity=float(propensity.mean()) if len(rows) else 0.0,
    )


def _spill(rows: Rows, folder: Path, width_ms: float, count: int) -> None:
    """Append each row to the file of the time in which it is received, so that memory holds one such file."""
    part = np.minimum(rows["received"] / width_ms, count - 1).astype(np.uint8)
    order = np.argsort(part, kind="stable")
    bounds = np.searchsorted(part[order], np.arange(count + 1))
    for index in range(count):
        with (folder / f"{index}.rows").open("ab") as file:
            rows[order[bounds[index] : bounds[index + 1]]].tofile(file)


def _read_spill(path: Path) -> Rows:
    rows: Rows = np.fromfile(path, ROW)
    path.unlink()
    return rows[np.argsort(rows["received"], kind="stable")]
