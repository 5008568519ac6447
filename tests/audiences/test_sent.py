"""What a preview says of destinations is what the synchronisation does after a refresh, and reaches nobody."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from audiences import definitions, population, preview, refresh, sent, sync, tables
from audiences import ledger as ledgers
from audiences.destinations import registry
from audiences.destinations.registry import Entry, Sending
from audiences.ledger import Ledger
from audiences.live import Live
from audiences.sent import Sent
from service.core.errors import PropensityError
from service.embedded import EmbeddedServer
from service.persons import Persons
from service.settings import Settings
from tests.audiences.conftest import WriteScores
from tests.audiences.kills import World
from tests.audiences.postgres import both

TEXT = """
defaults: {model: shop, margin: 0.2, min_size: 2, purpose: ads}
audiences: {likely: {cut: 0.5, destinations: [ours, theirs]}}
"""


class Case:
    """Visitors who mostly agreed, a refresh and a synchronisation of files, and a preview of what comes next."""

    def __init__(self, settings: Settings, write: WriteScores, artifacts: Path, directory: Path) -> None:
        namespace = settings.namespace
        self.world = World(str(settings.redis_url), 40, random.Random(5), namespace=namespace)
        self.settings, self.write, self.artifacts, self.directory = settings, write, artifacts, directory
        self.read = definitions.read(TEXT, "test.yaml")
        self.scored = 0
        self.missing: set[str] = set()

    def score(self, moved: int) -> None:
        """New scores of everybody, a little higher than the last; so many of the best and worst change places."""
        self.scored += 1
        names = [one.name for one in self.world.visitors]
        others = names[moved : len(names) - moved]
        order = [*names[len(names) - moved :], *others, *names[:moved]]
        scores = {name: place / len(names) + 0.001 * self.scored for place, name in enumerate(order)}
        at_ms = time.time_ns() // 1_000_000 + self.scored
        path = self.write(f"scores-{self.scored}", scores, at_ms=at_ms, last_event_ms=at_ms)
        self.snapshots = [population.open_snapshot(path)]
        self.bundles = population.bundles_of(self.snapshots, self.artifacts)

    def entry(self, name: str) -> Entry:
        if name in self.missing:
            raise PropensityError(f"no destination {name}")
        options: dict[str, Any] = {"url": str(self.directory / name), "purpose": "ads", "changes": False}
        fields = ("segment", "model") if name == "ours" else ("propensity",)
        given = {"kind": "files", **options, "fields": list(fields), "format": "ndjson"}
        text = yaml.safe_dump({"destinations": {name: given}})
        return registry.read(text, "destinations.yaml", {}).destination(name)

    def refresh(self) -> None:
        now_ms = refresh.moment(self.snapshots)
        lists = self.world.members, self.world.propensities
        self.world.runner.run(refresh.refresh(self.read, self.snapshots, self.bundles, *lists, now_ms))

    def sync(self, ledger: Ledger, name: str, dry_run: bool = False) -> sync.Counts:
        with Live(self.settings) as live:
            options = sync.Options(dry_run=dry_run)
            (found,) = sync.run(ledger, self.entry(name).build(), live, Sending(), "likely", options)
        return found

    def preview(self) -> preview.Preview:
        now_ms = refresh.moment(self.snapshots)
        lists = self.world.members, self.world.propensities
        made = preview.preview(self.read, "likely", self.snapshots, self.bundles, *lists, now_ms)
        found: preview.Preview = self.world.runner.run(made)
        return found

    def compare(self, ledger: Ledger) -> list[Sent]:
        found = self.preview()
        with Live(self.settings) as live:
            wanted = sent.Foreseen(live, found.audience, found.chosen)
            return sent.compare(ledger, wanted, "likely", self.entry, lambda stage, share: None)


@pytest.fixture
def case(
    embedded_server: EmbeddedServer, write_scores: WriteScores, two_models: Path, tmp_path: Path
) -> Iterator[Case]:
    settings = Settings(_env_file=None, redis_url=embedded_server.url, namespace=f"t{uuid.uuid4().hex[:8]}")
    found = Case(settings, write_scores, two_models, tmp_path / "lists")
    found.score(0)
    yield found
    found.world.close()


@both
def test_a_preview_says_what_the_next_synchronisation_does(case: Case, ledger: Ledger) -> None:
    assert [(one.destination, one.synced_ms, one.has) for one in case.compare(ledger)] == [
        ("ours", None, 0),
        ("theirs", None, 0),
    ]
    case.refresh()
    first = case.sync(ledger, "ours")
    assert first.added == first.wanted > 10
    began_ms = time.time_ns() // 1_000_000
    case.sync(ledger, "theirs")
    gone, withdrawn = [one for one in case.world.visitors[25:30] if one.allowed][:2]
    case.world.runner.run(Persons(case.world.store).erase(gone.name))
    case.world.visitors.remove(gone)
    withdrawn.allowed = False
    case.world.write(withdrawn)
    case.score(5)
    shown = case.compare(ledger)
    case.refresh()
    for one in shown:
        assert one.next is not None
        assert one.next.plain() == case.sync(ledger, one.destination, dry_run=True).plain()
        assert one.has == first.wanted
    ours, theirs = (one.next for one in shown if one.next is not None)
    assert ours.causes("remove") == {"consent": 1, "left": ours.removed - 1}
    assert ours.removed > 2
    assert ours.entering == theirs.entering > 2
    assert ours.unchanged > 2, "segments do not change with each score"
    assert theirs.added > theirs.entering, "propensities do"
    assert (shown[0].synced_ms or 0) <= began_ms <= (shown[1].synced_ms or 0)


@both
def test_a_destination_that_the_definition_does_not_name_any_more_would_be_emptied(case: Case, ledger: Ledger) -> None:
    case.refresh()
    sizes = [case.sync(ledger, name).added for name in ("ours", "theirs")]
    case.read = definitions.read(TEXT.replace(", theirs", ""), "test.yaml")
    ours, theirs = case.compare(ledger)
    assert (theirs.destination, theirs.has) == ("theirs", sizes[1])
    assert theirs.next is not None
    assert theirs.next.causes("remove") == {"deleted": sizes[1]}
    assert ours.next is not None
    assert (ours.next.added, ours.next.removed) == (0, 0)


def test_a_list_that_would_be_too_small_would_be_emptied(case: Case, ledger: Ledger) -> None:
    case.refresh()
    size = case.sync(ledger, "ours").added
    case.read = definitions.read(TEXT.replace("min_size: 2", "min_size: 30"), "test.yaml")
    ours = case.compare(ledger)[0]
    assert ours.next is not None
    assert (ours.next.below, ours.next.causes("remove")) == (30, {"minimum": size})


def test_what_is_not_known_is_said_and_the_ledger_is_told_all_the_same(case: Case, ledger: Ledger) -> None:
    case.refresh()
    size = case.sync(ledger, "ours").added
    case.missing = {"ours"}
    ours, theirs = case.compare(ledger)
    assert (ours.has, ours.next, ours.problem) == (size, None, "no destination ours")
    assert ours.synced_ms is not None
    assert theirs.next is not None


def test_nothing_is_written_or_sent(case: Case, ledger: Ledger) -> None:
    case.refresh()
    case.score(7)
    before = [str(row) for table in tables.all_tables.sorted_tables for row in _rows(ledger, table)]
    case.compare(ledger)
    assert [str(row) for table in tables.all_tables.sorted_tables for row in _rows(ledger, table)] == before
    assert not case.directory.exists()


def _rows(ledger: Ledger, table: Any) -> list[Any]:
    with ledger.reading.connect() as connection:
        return list(connection.execute(table.select()))


def test_a_preview_is_drawn_with_what_destinations_have(case: Case, ledger: Ledger, tmp_path: Path) -> None:
    case.refresh()
    case.sync(ledger, "ours")
    case.missing = {"theirs"}
    found = replace(case.preview(), sent=case.compare(ledger))
    preview.plot(found, tmp_path / "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text("utf-8")


@both
def test_no_ledger_is_made_by_looking_for_one(ledger_url: str) -> None:
    with ledgers.existing(ledger_url) as found:
        assert found is None
    with ledgers.existing(ledger_url) as found:
        assert found is None, "the first look made none"
    with ledgers.opened(ledger_url) as made:
        made.list_of("ours", "likely")
    with ledgers.existing(ledger_url) as found:
        assert found is not None
        assert found.copies("likely") == [ledgers.Copy("ours", None, 0)]
