"""What a destination gets of a member from the service's own data."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from audiences.destinations.protocol import Purpose
from audiences.live import Live
from service import consent
from service.core.bundle import InvalidBundle
from service.embedded import EmbeddedServer
from service.visitors import Visitors
from tests.conftest import MakeSettings

SCORES = {"anna": 0.87654321, "bert": 0.25}


@pytest.fixture
def live(make_settings: MakeSettings, embedded_server: EmbeddedServer) -> Iterator[Live]:
    with Live(make_settings(redis_url=embedded_server.url)) as live:
        for name in SCORES:
            said = consent.statement(time.time_ns() // 1_000_000, {"crm": True}, True)
            live.run(Visitors(live.store).append_said({name: said}, time.time_ns() // 1_000_000))
        score(live, SCORES)
        live.run(live.members.change("vip", dict.fromkeys(SCORES, 1), [], 1, "test"))
        live.run(live.members.describe("vip", json.dumps({"model": "shop"}), 1))
        yield live


def score(live: Live, scores: Mapping[str, float]) -> None:
    now_ms = time.time_ns() // 1_000_000
    live.run(live.propensities.put("shop", "1", list(scores), list(scores.values()), now_ms))


def seen(live: Live, *fields: str) -> list[tuple[str | float | None, ...]]:
    """Fields of everybody, who first has the greatest score."""
    people = [one.person for one in live.candidates("vip", Purpose.CRM, ("external_id",), fields)]
    people.sort(key=lambda one: one.fields["propensity"], reverse=True)
    return [tuple(one.fields.get(name) for name in fields) for one in people]


def test_scores_have_four_digits_and_percentiles_are_whole(live: Live) -> None:
    # The reference of the tests has as many scores in each percent.
    assert seen(live, "propensity", "percentile", "model") == [(0.8765, 87, "shop"), (0.25, 25, "shop")]


def test_scores_that_tremble_change_few_percentiles(live: Live) -> None:
    dice = np.random.default_rng(7)
    names = [f"v{number}" for number in range(1000)]
    live.run(live.members.change("vip", dict.fromkeys(names, 1), [], 1, "test"))
    for name in names:
        said = consent.statement(time.time_ns() // 1_000_000, {"crm": True}, True)
        live.run(Visitors(live.store).append_said({name: said}, time.time_ns() // 1_000_000))
    before = dice.uniform(0.1, 0.9, len(names))
    after = before + dice.normal(0, 0.0005, len(names))
    told = []
    for scores in (before, after):
        score(live, dict(zip(names, scores.tolist(), strict=True)))
        people = [one.person for one in live.candidates("vip", Purpose.CRM, ("external_id",), ("percentile",))]
        told.append({one.key: (one.fields["propensity"], one.fields["percentile"]) for one in people if one.fields})
    changed = [[one != other for one, other in zip(told[0][key], told[1][key], strict=True)] for key in told[0]]
    propensities, percentiles = np.array(changed).sum(axis=0)
    assert propensities > 800
    assert 0 < percentiles < 100


def test_a_percentile_of_a_model_that_is_not_there_says_what_is_missing(
    make_settings: MakeSettings, live: Live
) -> None:
    live.run(live.members.describe("vip", json.dumps({"model": "gone"}), 1))
    live.run(live.propensities.put("gone", "1", list(SCORES), list(SCORES.values()), 1))
    live.__dict__.pop("_audiences", None)
    assert seen(live, "propensity") == [(0.8765,), (0.25,)]
    with pytest.raises(InvalidBundle, match="gone: holds no bundle"):
        seen(live, "propensity", "percentile")
