"""Who visits the shop and what they do there: visitors by a power law, and the events of each page they open."""

from __future__ import annotations

import uuid
from collections.abc import Container, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import Any, Final

import numpy as np

# The catalogue of examples/shop.yaml. What another one does not have is sent all the same, and not expected in scores.
HOME, VIEW, CART, ORDER, SEARCH = (
    "Home Viewed",
    "Product Viewed",
    "Product Added",
    "Order Completed",
    "Products Searched",
)
CATEGORIES: Final = ("shoes", "shirts", "jackets", "bags", "kitchen", "garden", "games", "books")
DEVICES: Final = ("mobile", "mobile", "mobile", "desktop", "desktop", "tablet")
REFERRERS: Final = ("search", "search", "direct", "email", "ads")
MEAN_PAGES: Final = 5
CART_SHARE, ORDER_SHARE, SEARCH_SHARE = 0.15, 0.02, 0.1
# An event that is ahead of the service's clock does not count yet: a tracker sends what happened a second ago, so that
# clocks of two machines may differ by as much.
EVENT_AGE_MS: Final = 1000

Event = dict[str, Any]


class Population:
    """Visitors by rank from 1; one comes as often as `rank ** -exponent` says, 0 being all alike.

    Their ids are the given ones in their order, or `visitor-RANK`.
    """

    def __init__(self, size: int, exponent: float, ids: Sequence[str] = ()) -> None:
        self.ids, self.size = ids, len(ids) or size
        self._share = np.cumsum(np.arange(1, self.size + 1, dtype=np.float64) ** -exponent)

    def pick(self, rng: Random) -> str:
        """The next visitor."""
        rank = int(np.searchsorted(self._share, rng.random() * self._share[-1], side="right"))
        return self.ids[rank] if self.ids else f"visitor-{rank + 1}"


@dataclass
class Visit:
    """A visitor on the site, and what the service acknowledged of what it did there.

    Nobody else sends events of a visitor who is `new`.
    """

    visitor_id: str
    is_new: bool
    device: str
    referrer: str
    pages: int  # still to come
    is_begun: bool = False
    counted: int = 0  # events that the next score must have
    last_ms: int = 0  # time of the latest of them


def begin(rng: Random, population: Population, new_share: float) -> Visit:
    """A visit of somebody out of the population, or of somebody new."""
    is_new = rng.random() < new_share
    visitor_id = f"anonymous-{uuid.uuid4().hex}" if is_new else population.pick(rng)
    pages = 1 + int(rng.expovariate(1 / (MEAN_PAGES - 1)))
    return Visit(visitor_id, is_new, rng.choice(DEVICES), rng.choice(REFERRERS), pages)


def open_page(visit: Visit, rng: Random, now_ms: int) -> list[Event]:
    """The events of the next page: the home page where the visit begins, then products."""
    happened: list[tuple[str, Event]] = [(HOME, {})]
    if visit.is_begun:
        price, category = round(rng.lognormvariate(3.5, 0.8), 2), rng.choice(CATEGORIES)
        product = {"price": price, "category": category}
        search = [(SEARCH, {"query": category})] if rng.random() < SEARCH_SHARE else []
        cart = [(CART, product)] if rng.random() < CART_SHARE else []
        order = [(ORDER, {"revenue": price})] if rng.random() < ORDER_SHARE else []
        happened = [*search, (VIEW, product), *cart, *order]
    visit.is_begun = True
    visit.pages -= 1
    return [_event(visit, now_ms - EVENT_AGE_MS + place, *what) for place, what in enumerate(happened)]


def _event(visit: Visit, happened_ms: int, name: str, properties: Event) -> Event:
    return {
        "type": "page" if name == HOME else "track",
        "name" if name == HOME else "event": name,
        "anonymousId" if visit.is_new else "userId": visit.visitor_id,
        "messageId": uuid.uuid4().hex,
        "timestamp": datetime.fromtimestamp(happened_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        "properties": properties,
        "context": {"device": visit.device, "referrer": visit.referrer},
    }


def is_counted(event: Event, catalogue: Container[str]) -> bool:
    """Whether the catalogue has the event; others can be accepted too, for the traits that come with them."""
    if event["type"] == "page":
        return event["name"] in catalogue or "Page Viewed" in catalogue
    return event["event"] in catalogue
