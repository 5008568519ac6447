"""HubSpot and Klaviyo under the synchronisation: what the accounts hold in the end, whatever went wrong on the way."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from audiences import ledger as ledgers
from audiences import sync
from audiences.destinations import hubspot, klaviyo, registry
from audiences.destinations.protocol import Destination
from audiences.ledger import Ledger
from service import consent
from service.core.errors import PropensityError
from service.embedded import EmbeddedServer
from service.members import Members
from service.propensities import Propensities
from service.store import Store
from service.visitors import Visitors
from tests.audiences.people import People, Somebody
from tests.audiences.stubs import hubspot as hubspot_stub
from tests.audiences.stubs import klaviyo as klaviyo_stub
from tests.cli.test_commands import propensity

PATIENT = registry.Sending(patience_s=30, first_wait_s=0.001, longest_wait_s=0.002)
SEGMENTS = ("champions", "warm_prospects", "nurture")


class Crm:
    """HubSpot, and what it holds."""

    def __init__(self, stub: hubspot_stub.HubSpot) -> None:
        self.stub = stub
        given = {"token": SecretStr(hubspot_stub.TOKEN), "endpoint": stub.url, "task": {}, "fields": ("segment",)}
        self.destination: Destination = hubspot.build("ours", hubspot.Options(**given, requests_per_10s=100_000))

    def register(self, name: str) -> str:
        return self.stub.contact(external_id=name)

    def holds(self) -> dict[str, str]:
        """Who is on the list, with their segment."""
        (members,) = self.stub.members.values()
        return {self.stub.contacts[id]["external_id"]: self.stub.contacts[id]["propensity_segment"] for id in members}

    def scored(self) -> set[str]:
        """Who keeps a segment."""
        return {own["external_id"] for own in self.stub.contacts.values() if own.get("propensity_segment")}


class Mail:
    """Klaviyo, and what it holds."""

    def __init__(self, stub: klaviyo_stub.Klaviyo) -> None:
        self.stub = stub
        given = {"api_key": SecretStr(klaviyo_stub.KEY), "endpoint": stub.url, "job_poll_s": 0.01}
        self.destination: Destination = klaviyo.build("ours", klaviyo.Options(**given, fields=("segment",)))
        self.destination.limits = self.destination.limits._replace(requests=1000)  # of its own clock, not the stub's

    def register(self, name: str) -> str:
        return self.stub.profile(name)

    def holds(self) -> dict[str, str]:
        """Who is on the list, with their segment."""
        (members,) = self.stub.members.values()
        own = {id: self.stub.profiles[id] for id in members}
        return {one["external_id"]: one["properties"]["propensity_segment"] for one in own.values()}

    def scored(self) -> set[str]:
        """Who keeps a segment."""
        everybody = self.stub.profiles.values()
        return {own["external_id"] for own in everybody if "propensity_segment" in own["properties"]}


Account = Crm | Mail


@pytest.fixture(params=[(hubspot_stub.HubSpot, Crm), (klaviyo_stub.Klaviyo, Mail)], ids=["hubspot", "klaviyo"])
def account(request: pytest.FixtureRequest) -> Iterator[Account]:
    stub, kind = request.param
    with stub() as server:
        yield kind(server)
        assert server.broken == []


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with ledgers.opened(f"sqlite:///{tmp_path / 'ledger.db'}") as opened:
        yield opened


def test_requests_that_fail_and_answers_that_are_lost_change_nothing_in_the_end(
    account: Account, ledger: Ledger
) -> None:
    chance, people = random.Random(5), People()
    names = [f"u{number}" for number in range(400)]
    for name in names[:350]:
        account.register(name)
    for _ in range(3):
        people.lists["everyone"] = {
            name: Somebody(name, segment=chance.choice(SEGMENTS), allowed=chance.random() < 0.9)
            for name in names
            if chance.random() < 0.8
        }
        for _ in range(6):
            account.stub.refuse(
                "batch|import|relationships|memberships|GET /api/profiles", chance.choice((429, 500, 503))
            )
            account.stub.lose("batch/update|batch/create|bulk-import|relationships|memberships")
        (counts,) = sync.run(ledger, account.destination, people, PATIENT)
        wanted = {one.name: one.segment for one in people.lists["everyone"].values() if one.allowed}
        assert counts.wanted == len(wanted)
        known = {name: segment for name, segment in wanted.items() if name in names[:350]}
        assert account.holds() == known
        assert account.scored() == set(known)
        assert counts.all_refused == len(wanted) - len(known)
        assert account.stub.faults == []
    if isinstance(account, Crm):
        keys = [task["propensity_key"] for task in account.stub.tasks.values()]
        assert len(set(keys)) == len(keys) > 100


def test_a_second_run_sends_nothing(account: Account, ledger: Ledger) -> None:
    people = People()
    for name in ("anna", "bert"):
        account.register(name)
        people.want("everyone", Somebody(name))
    sync.run(ledger, account.destination, people, PATIENT)
    before = len(account.stub.sent("POST|PUT|DELETE"))
    (counts,) = sync.run(ledger, account.destination, people, PATIENT)
    assert counts.unchanged == 2
    assert account.stub.sent("POST|PUT|DELETE")[before:] == []


def test_who_withdraws_consent_is_off_the_list_and_keeps_no_score(account: Account, ledger: Ledger) -> None:
    people = People()
    for name in ("anna", "bert"):
        account.register(name)
        people.want("everyone", Somebody(name))
    sync.run(ledger, account.destination, people, PATIENT)
    people.want("everyone", Somebody("anna", allowed=False))
    sync.run(ledger, account.destination, people, PATIENT)
    assert account.holds() == {"bert": "warm_prospects"}
    assert account.scored() == {"bert"}


def test_who_has_no_contact_is_tried_again_after_a_growing_while(account: Account, ledger: Ledger) -> None:
    people, now_ms = People(), [1_790_000_000_000]
    account.register("bert")
    people.want("everyone", Somebody("anna"), Somebody("bert"))

    def run(days: float) -> sync.Counts:
        now_ms[0] += round(days * ledgers.DAY_MS)
        clock = sync.Clock(lambda: now_ms[0])
        (counts,) = sync.run(ledger, account.destination, people, PATIENT, clock=clock)
        return counts

    assert (run(0).refused, account.holds()) == (1, {"bert": "warm_prospects"})
    for wait_days in (1, 7, 30, 30):
        counts = run(wait_days - 0.01)
        assert (counts.refused_before, counts.added, counts.complete) == (1, 0, False), "not before its time"
        counts = run(0.01)
        assert (counts.refused, counts.refused_before, dict(counts.why)) == (1, 0, {"add: again": 1})
    people.want("everyone", Somebody("anna", segment="champions"))
    assert run(0).why == {"add: fields": 1}, "a change waits for nothing, and begins anew"
    account.register("anna")
    assert run(0.9).added == 0
    assert run(0.1).complete
    assert account.holds() == {"anna": "champions", "bert": "warm_prospects"}
    assert run(100).why == {}


@pytest.mark.parametrize("kind", ["hubspot", "klaviyo"])
def test_without_the_extra_it_says_what_to_install(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = {"hubspot": "hubspot", "klaviyo": "klaviyo_api"}[kind]
    monkeypatch.delitem(sys.modules, f"audiences.destinations.{kind}")
    monkeypatch.setitem(sys.modules, client, None)
    with pytest.raises(PropensityError, match=rf"needs {client}, .* pip install 'propensity\[{kind}\]'"):
        entry(kind, {}).build()


@pytest.mark.parametrize(("kind", "secret"), [("hubspot", "token"), ("klaviyo", "api_key")])
def test_a_file_builds_it_with_the_secret_of_the_environment(kind: str, secret: str) -> None:
    built = entry(kind, {secret: "${SECRET}", "prefix": "Shop: "}).build()
    assert type(built).__module__ == f"audiences.destinations.{kind}"
    assert built.name == "ours"
    with pytest.raises(PropensityError, match="no place for a secret") as raised:
        entry(kind, {secret: "in-the-clear"}).build()
    assert "in-the-clear" not in str(raised.value)


def entry(kind: str, options: dict[str, Any]) -> registry.Entry:
    text = yaml.safe_dump({"destinations": {"ours": {"kind": kind, **options}}})
    return registry.read(text, "destinations.yaml", {"SECRET": "s3cr3t"}).destination("ours")


async def fill(url: str, namespace: str, names: list[str]) -> None:
    """Members of one audience in a real feature cache; the last one agreed to nothing but advertising."""
    store, now_ms = Store.open(url, namespace=namespace, retention_ms=10**9), time.time_ns() // 1_000_000
    members, propensities = Members(store), Propensities(store)
    for name in names:
        said = consent.statement(now_ms, {"ads": True, "crm": name != names[-1], "email": name != names[-1]}, True)
        await Visitors(store).append_said({name: said}, now_ms)
        await propensities.move("shop", {name: "champions"}, now_ms)
    await members.change("everyone", dict.fromkeys(names, now_ms), [], now_ms, "test")
    definition = {"destinations": ["ours"], "min_size": 1, "model": "shop"}
    await members.describe("everyone", json.dumps(definition), now_ms)
    await store.close()


def test_the_command_brings_members_of_the_service_to_the_account(
    account: Account, embedded_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kind, secret, value = {
        Crm: ("hubspot", "token", hubspot_stub.TOKEN),
        Mail: ("klaviyo", "api_key", klaviyo_stub.KEY),
    }[type(account)]
    names = [f"{kind}-{number}" for number in range(4)]
    for name in names[1:]:
        account.register(name)
    asyncio.run(fill(embedded_server.url, kind, names))
    for setting, said in {
        "PROPENSITY_REDIS_URL": embedded_server.url,
        "PROPENSITY_NAMESPACE": kind,
        "PROPENSITY_LEDGER_URL": f"sqlite:///{tmp_path / 'own.db'}",
        "OUR_SECRET": value,
    }.items():
        monkeypatch.setenv(setting, said)
    file = tmp_path / "destinations.yaml"
    file.write_text(
        f"destinations:\n  ours: {{kind: {kind}, {secret}: '${{OUR_SECRET}}', endpoint: '{account.stub.url}'}}\n"
    )
    done = propensity("audiences", "sync", "--to", "ours", "--destinations", file, "--json")
    assert done.status == 1, "one has no contact"
    (counts,) = json.loads(done.out)
    assert (counts["wanted"], counts["without_consent"], counts["refused"]) == (3, 1, 1)
    assert account.holds() == dict.fromkeys(names[1:3], "champions")
    assert value not in done.out + done.err
