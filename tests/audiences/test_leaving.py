"""Who withdraws consent or is erased is gone from every kind of destination after the next run, whatever was before."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import SecretStr

from audiences import sync, tables
from audiences.destinations import data_manager, files, google, hubspot, klaviyo, meta, webhook
from audiences.destinations.protocol import Destination
from audiences.destinations.registry import Sending
from audiences.ledger import Ledger
from audiences.live import Live
from service import consent, identity
from service.embedded import EmbeddedServer
from service.persons import Persons
from service.visitors import Visitors
from tests.audiences.people import key_of
from tests.audiences.receiving import SECRET, Receiving
from tests.audiences.stubs import hubspot as hubspot_stub
from tests.audiences.stubs import klaviyo as klaviyo_stub
from tests.audiences.stubs import meta as meta_stub
from tests.audiences.stubs.data_manager import DataManagerStub
from tests.audiences.stubs.google import GoogleStub
from tests.conftest import MakeSettings

pytestmark = pytest.mark.usefixtures("trusted")

SENDING: Final = Sending(patience_s=10, first_wait_s=0.01, longest_wait_s=0.05)
PURPOSES: Final = ("ads", "email", "crm")
ANNA, BERT = "visitor-anna", "visitor-bert"

Holds = Callable[[], str]


class Shop:
    """A real feature cache with one audience, and the lists at one destination that are kept in step with it."""

    def __init__(self, make_settings: MakeSettings, url: str, ledger: Ledger) -> None:
        self.settings, self.ledger = make_settings(redis_url=url), ledger
        self.now_ms = time.time_ns() // 1_000_000 - 10**7

    def say(self, name: str, email: str | None = None, agrees: bool | None = None) -> None:
        """Let a member give an address, or give or withdraw consent."""
        self.now_ms += 1
        said = b""
        if email is not None:
            hashes = [(form, identity.hashed(form, email)) for form in identity.EMAILS]
            said += b"".join(consent.identifier(self.now_ms, [form], value) for form, value in hashes)
        if agrees is not None:
            said += consent.statement(self.now_ms, dict.fromkeys(PURPOSES, agrees), True)
        with Live(self.settings) as live:
            live.run(Visitors(live.store).append_said({name: said}, time.time_ns() // 1_000_000))

    def enter(self, *names: str) -> None:
        with Live(self.settings) as live:
            live.run(live.propensities.put("shop", "1", names, [0.5] * len(names), self.now_ms))
            live.run(live.propensities.move("shop", dict.fromkeys(names, "champions"), self.now_ms))
            live.run(live.members.change("vip", dict.fromkeys(names, self.now_ms), [], self.now_ms, "test"))

    def define(self, *destinations: str) -> None:
        with Live(self.settings) as live:
            definition = json.dumps({"destinations": destinations, "model": "shop"})
            live.run(live.members.describe("vip", definition, self.now_ms))
            # Another audience, as a shop has, without which an empty cache would be taken for the wrong one.
            live.run(live.members.describe("other", json.dumps({"destinations": ["elsewhere"]}), self.now_ms))

    def drop(self) -> None:
        with Live(self.settings) as live:
            live.run(live.members.drop("vip"))

    def erase(self, name: str) -> None:
        with Live(self.settings) as live:
            live.run(Persons(live.store).erase(name))

    def sync(self, destination: Destination) -> None:
        with Live(self.settings) as live:
            sync.run(self.ledger, destination, live, SENDING)


def traces(name: str, *emails: str) -> list[str]:
    """All that a destination could know somebody by."""
    hashes = [identity.hashed(form, email) for form in identity.EMAILS for email in emails]
    return [name, key_of(name), *hashes]


@pytest.fixture
def shop(make_settings: MakeSettings, embedded_server: EmbeddedServer, ledger: Ledger) -> Shop:
    found = Shop(make_settings, embedded_server.url, ledger)
    found.define("ours")
    found.say(ANNA, "anna@example.com", agrees=True)
    found.say(BERT, "bert@example.com", agrees=True)
    found.enter(ANNA, BERT)
    return found


def at_files(stack: ExitStack, directory: Path) -> tuple[Destination, Holds]:
    options = {"url": str(directory / "out"), "purpose": "crm", "format": "ndjson", "changes": False}
    built = files.build("ours", files.Options.model_validate(options))
    return built, lambda: "".join(path.read_text() for path in (directory / "out").glob("*.ndjson"))


def at_webhook(stack: ExitStack, directory: Path) -> tuple[Destination, Holds]:
    receiving = stack.enter_context(Receiving())
    options = {"url": receiving.url, "secret": SecretStr(SECRET), "purpose": "crm"}
    built = webhook.build("ours", webhook.Options.model_validate(options))
    stack.callback(lambda: _unbroken(receiving.report()["violations"]))
    return built, lambda: json.dumps(receiving.report()["lists"])


def at_google(stack: ExitStack, directory: Path) -> tuple[Destination, Holds]:
    stub = stack.enter_context(GoogleStub().serving())
    stack.callback(lambda: _unbroken(stub.broken))
    options = stub.options
    return google.build("ours", google.Options.model_validate(options)), lambda: str(stub.members)


def at_data_manager(stack: ExitStack, directory: Path) -> tuple[Destination, Holds]:
    stub = stack.enter_context(DataManagerStub().serving())
    stack.callback(lambda: _unbroken(stub.broken))
    options = stub.options | {"customer_match_terms": "accepted"}
    built = data_manager.build("ours", data_manager.Options.model_validate(options))
    return built, lambda: str(stub.members)


def at_meta(stack: ExitStack, directory: Path) -> tuple[Destination, Holds]:
    stub = stack.enter_context(meta_stub.serving(meta_stub.MetaStub()))
    stack.callback(lambda: _unbroken(stub.broken))
    options = {
        "ad_account_id": stub.account,
        "access_token": SecretStr(stub.access_token),
        "app_secret": SecretStr(str(stub.app_secret)),
        "endpoint": stub.endpoint,
    }
    return meta.build("ours", meta.Options.model_validate(options)), lambda: str(stub.members)


def at_hubspot(stack: ExitStack, directory: Path) -> tuple[Destination, Holds]:
    stub = stack.enter_context(hubspot_stub.HubSpot())
    stack.callback(lambda: _unbroken(stub.broken))
    ids = {stub.contact(external_id=name): name for name in (ANNA, BERT)}
    options = {"token": SecretStr(hubspot_stub.TOKEN), "endpoint": stub.url}
    built = hubspot.build("ours", hubspot.Options.model_validate(options))

    def holds() -> str:
        listed = [ids[id] for members in stub.members.values() for id in members]
        scored = [own["external_id"] for own in stub.contacts.values() if any(own.get(name) for name in OURS)]
        return str([listed, scored])

    return built, holds


def at_klaviyo(stack: ExitStack, directory: Path) -> tuple[Destination, Holds]:
    stub = stack.enter_context(klaviyo_stub.Klaviyo())
    stack.callback(lambda: _unbroken(stub.broken))
    ids = {stub.profile(name): name for name in (ANNA, BERT)}
    options = {"api_key": SecretStr(klaviyo_stub.KEY), "endpoint": stub.url, "job_poll_s": 0.01}
    built = klaviyo.build("ours", klaviyo.Options.model_validate(options))

    def holds() -> str:
        listed = [ids[id] for members in stub.members.values() for id in members]
        scored = [own["external_id"] for own in stub.profiles.values() if set(OURS) & set(own["properties"])]
        return str([listed, scored])

    return built, holds


OURS: Final = ("propensity", "propensity_segment", "propensity_lists")
KINDS: Final = {
    "files": at_files,
    "webhook": at_webhook,
    "google-ads": at_google,
    "google-data-manager": at_data_manager,
    "meta": at_meta,
    "hubspot": at_hubspot,
    "klaviyo": at_klaviyo,
}


def _unbroken(broken: list[Any]) -> None:
    assert broken == []


@pytest.fixture(params=KINDS)
def account(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Destination, Holds]]:
    with ExitStack() as stack:
        yield KINDS[request.param](stack, tmp_path)


@pytest.mark.parametrize("audience", ["is as before", "goes elsewhere by its definition", "was dropped"])
@pytest.mark.parametrize("goes", ["withdraws", "is erased"])
def test_who_leaves_is_gone_with_every_identifier_they_ever_had(
    shop: Shop, account: tuple[Destination, Holds], goes: str, audience: str
) -> None:
    destination, holds = account
    shop.sync(destination)
    for name, email in ((ANNA, "anna@example.com"), (BERT, "bert@example.com")):
        assert any(one in holds() for one in traces(name, email))
    shop.say(ANNA, "anna@second.example")
    shop.sync(destination)
    shop.say(ANNA, "anna@third.example")  # of which the destination never hears
    if goes == "withdraws":
        shop.say(ANNA, agrees=False)
    else:
        shop.erase(ANNA)
    match audience:
        case "goes elsewhere by its definition":
            shop.define("elsewhere")
        case "was dropped":
            shop.drop()
    shop.sync(destination)
    every = traces(ANNA, "anna@example.com", "anna@second.example", "anna@third.example")
    assert [one for one in every if one in holds()] == []
    stays = any(one in holds() for one in traces(BERT, "bert@example.com"))
    assert stays == (audience == "is as before")
    shop.sync(destination)  # which Google tells that the removal is done
    with shop.ledger.reading.connect() as connection:
        rows = [row for table in tables.all_tables.sorted_tables for row in connection.execute(table.select())]
    left = " ".join(value.hex() if isinstance(value, bytes) else str(value) for row in rows for value in row)
    assert [one for one in every[2:] if one in left] == []
    assert (key_of(ANNA) in left) == (goes == "withdraws"), "that somebody withdrew is told for a while"


def test_an_address_that_changed_is_removed_before_the_new_one_is_added(
    shop: Shop, account: tuple[Destination, Holds]
) -> None:
    destination, holds = account
    shop.sync(destination)
    shop.say(ANNA, "anna@second.example")
    shop.sync(destination)
    assert [one for one in traces(ANNA, "anna@example.com")[2:] if one in holds()] == []
