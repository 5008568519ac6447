"""The destinations webhook and files, and the file that names destinations."""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from pydantic import SecretStr, ValidationError

from audiences import ledger as ledgers
from audiences import sync, triggers
from audiences.destinations import files, registry, webhook
from audiences.destinations.protocol import Busy, DestinationError, Outcome, Person, Purpose, Rejected
from audiences.signed import post
from service.core.errors import PropensityError
from tests.audiences.people import People, Somebody, key_of
from tests.audiences.receiving import SECRET, Receiving

ANNA = Somebody("anna").candidate.person
BERT = Somebody("bert").candidate.person
NOON = datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC)


# --- the webhook ---


def hook(url: str, **given: object) -> webhook.WebhookDestination:
    options = {"url": url, "secret": SecretStr(SECRET), "purpose": "crm", **given}
    return webhook.build("ours", webhook.Options.model_validate(options))


def test_a_webhook_is_told_members_signed_by_standard_webhooks() -> None:
    with Receiving() as receiver:
        ours = hook(receiver.url)
        refused = Person("f" * 64, {"external_id": ("zoe",)})
        assert [tuple(one) for one in ours.add("vip", [ANNA, BERT, refused], "batch-1")] == [
            (True, "200", True),
            (True, "200", True),
            (False, "of no use here", True),
        ]
        assert [one.accepted for one in ours.remove("vip", [BERT], "batch-2")] == [True]
        report = receiver.report()
    assert report["violations"] == []
    assert list(report["lists"]["vip"]) == [ANNA.key]
    member = report["lists"]["vip"][ANNA.key]
    assert member["identifiers"] == {form: list(values) for form, values in ANNA.identifiers.items()}


def test_a_wrong_secret_is_noticed_by_the_receiver() -> None:
    with Receiving() as receiver:
        with pytest.raises(Rejected, match="answers 400: the signature is wrong"):
            hook(receiver.url, secret=SecretStr("whsec_" + "QUJD" * 8)).add("vip", [ANNA], "batch-1")
        assert receiver.report()["violations"] == ["the signature is wrong"]


def test_whatever_may_pass_is_busy_and_the_rest_is_rejected() -> None:
    with Receiving(share=1) as receiver:
        for number in range(6):
            with pytest.raises(Busy):
                hook(receiver.url).add("vip", [ANNA], f"batch-{number}")
    with pytest.raises(Busy, match="does not answer"):
        hook(receiver.url).add("vip", [ANNA], "batch")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"url": "http://hooks.example.com/"}, "write an address that begins with https://"),
        ({"secret": "whsec_plain"}, "write ${NAME}, the name of an environment variable"),
        ({"secret": SecretStr("whsec_")}, "is no key; write whsec_ and 24 to 64 random bytes in base64"),
        ({"secret": SecretStr("correct horse battery staple, and more")}, "is no key; write whsec_ and 24 to 64"),
        ({"secret": SecretStr("whsec_" + "QUJD" * 5)}, "is no key; write whsec_ and 24 to 64 random bytes in base64"),
        ({"timeout_s": 600}, "less than or equal to 60"),
        ({"colour": "red"}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_options_of_a_webhook_are_told_without_the_secret(given: dict[str, object], said: str) -> None:
    options = {"url": "https://hooks.example.com/", "secret": SecretStr(SECRET), "purpose": "crm"}
    with pytest.raises(ValueError, match="(?s).") as error:
        webhook.Options.model_validate(options | given)
    assert said in str(error.value)
    assert "plain" not in str(error.value)


def test_no_redirect_is_followed(tmp_path: Path) -> None:
    import http.server

    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802 - the library's name
            seen.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        do_GET = do_POST  # noqa: N815 - the library's name

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        options = webhook.Options.model_validate(
            {"url": f"http://127.0.0.1:{server.server_port}/", "secret": SecretStr(SECRET), "purpose": "crm"}
        )
        with pytest.raises(Rejected, match="answers 302"):
            post(options, "name", b"{}", NOON)
    finally:
        server.shutdown()
        server.server_close()
    assert seen == ["/"]


def test_fields_that_nobody_gives_are_refused() -> None:
    for kind, options in (
        (files, {"url": "out"}),
        (webhook, {"url": "https://x.example", "secret": SecretStr(SECRET)}),
    ):
        with pytest.raises(ValidationError, match="Input should be 'propensity', 'percentile', 'segment' or 'model'"):
            kind.Options.model_validate({**options, "purpose": "crm", "fields": ["score"]})


def _dripping(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(40):
        connection.sendall(b"x")
        time.sleep(0.05)


def _endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65_536)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (b"", "Busy: does not answer (RemoteDisconnected)"),
        (b"\0\1\2\n" * 100, "Busy: does not answer (BadStatusLine)"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "Busy: does not answer (IncompleteRead)"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n", "Busy: does not answer (HTTPException)"),
        (b"HTTP/1.1 429 Slow\r\nRetry-After: \xb2\r\n\r\n", "Busy: answers 429: Slow"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n", "Rejected: answers 302: Found"),
        (b"HTTP/1.1 307 Moved\r\nLocation: /elsewhere\r\n\r\n", "Rejected: answers 307: Moved"),
        (b"HTTP/1.1 410 Gone\r\nContent-Length: 99\r\n\r\ngone", "Rejected: answers 410: gone"),
        (_dripping, "Busy: does not answer (TimeoutError)"),
        (_endless, "taken"),
    ],
)
def test_whatever_a_receiver_answers_is_told_as_busy_or_rejected_and_in_time(
    answer: bytes | Callable[[socket.socket], None], outcome: str
) -> None:
    def serve() -> None:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65_536)
            connection.sendall(answer) if isinstance(answer, bytes) else answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        serving = threading.Thread(target=serve)
        serving.start()
        port = server.getsockname()[1]
        ours = hook(f"http://127.0.0.1:{port}/?token=canary", timeout_s=0.3)
        try:
            assert [*ours.add("vip", [ANNA], "batch-1")] == [Outcome(True, "200")]
            found = "taken"
        except DestinationError as error:
            found = f"{type(error).__name__}: {error}"
        serving.join()
    assert found.replace(f"127.0.0.1:{port} ", "") == outcome


# --- files ---


def whole(url: str, **given: object) -> files.Files:
    options = {"url": url, "purpose": "crm", "fields": ("propensity", "segment"), **given}
    return files.Files("out", files.Options.model_validate(options), lambda: NOON)


@pytest.mark.parametrize("kind", ["parquet", "csv", "ndjson"])
def test_a_list_is_one_file_and_each_change_another(tmp_path: Path, kind: str) -> None:
    fields = ("propensity", "percentile", "segment")
    out = whole(str(tmp_path), format=kind, forms=("google.email",), fields=fields)
    person = Person(ANNA.key, ANNA.identifiers, {"propensity": 0.25, "percentile": 87, "segment": "champions"})
    out.add("vip", [person], "one")
    out.remove("vip", [person], "two")
    out.write("vip", iter([person]))
    email = ANNA.identifiers["google.email"][0]
    read = {"parquet": _parquet, "csv": _csv, "ndjson": _ndjson}[kind]
    [row] = read(tmp_path / f"vip.{kind}")
    assert {name: str(value) for name, value in row.items()} == {
        "key": ANNA.key,
        "google.email": email if kind == "csv" else str([email]),
        "propensity": "0.25",
        "percentile": "87",
        "segment": "champions",
    }
    [added] = read(tmp_path / "changes" / "vip" / f"20261124T120000Z-one.{kind}")
    [removed] = read(tmp_path / "changes" / "vip" / f"20261124T120000Z-two.{kind}")
    assert (added["operation"], removed["operation"]) == ("add", "remove")
    assert added["key"] == removed["key"] == ANNA.key
    assert not removed["google.email"], "who goes is named by key alone"


def _parquet(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def _csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _ndjson(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_list_that_cannot_be_finished_leaves_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    out = whole(str(tmp_path), format="ndjson")
    out.write("vip", [ANNA])
    before = (tmp_path / "vip.ndjson").read_bytes()

    def broken() -> Any:
        yield from [BERT] * 20_000
        raise OSError(28, "No space left on device")

    with pytest.raises(Busy, match="No space left on device"):
        out.write("vip", broken())
    assert [path.name for path in tmp_path.iterdir()] == ["vip.ndjson"]
    assert (tmp_path / "vip.ndjson").read_bytes() == before


def test_an_id_with_line_breaks_is_one_cell_of_a_file(tmp_path: Path) -> None:
    ours = whole(str(tmp_path), format="csv", forms=("external_id",))
    ours.write("vip", [Person(key_of("x"), {"external_id": ("\rx\r\n=y\n",)})])
    [row] = _csv(next(tmp_path.glob("**/*.csv")))
    assert row["external_id"] == "\rx\r\n=y\n"


def test_files_go_to_any_file_system_of_fsspec() -> None:
    out = whole("memory://lists", format="ndjson")
    out.write("vip", [ANNA])
    out.add("vip", [ANNA], "one")
    system = fsspec.filesystem("memory")
    assert sorted(system.find("/lists")) == [
        "/lists/changes/vip/20261124T120000Z-one.ndjson",
        "/lists/vip.ndjson",
    ]
    system.rm("/lists", recursive=True)
    with pytest.raises(PropensityError, match=r"out\.url: nonsense: Protocol not known"):
        whole("nonsense://x")


def test_old_files_of_changes_are_deleted(tmp_path: Path) -> None:
    out = whole(str(tmp_path), keep_days=30)
    out.add("vip", [ANNA], "new")
    (tmp_path / "changes" / "vip" / "20261024T115959Z-old.parquet").write_bytes(b"")
    out.write("vip", [ANNA])
    assert [path.name for path in (tmp_path / "changes" / "vip").iterdir()] == ["20261124T120000Z-new.parquet"]


def test_no_audience_reaches_a_file_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="is no name of a file"):
        whole(str(tmp_path)).open("../vip")


def test_a_synchronised_file_has_who_is_wanted_and_is_written_after_a_kill_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = People(to=("out",))
    people.want("vip", *(Somebody(f"v{number}", allowed=number != 3) for number in range(7)))
    out = whole(str(tmp_path / "lists"), format="ndjson")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with ledgers.opened(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(out, "write", killed)
            sync.run(ledger, out, people, registry.Sending())
        [counts] = sync.run(ledger, out, people, registry.Sending())
        assert counts.added == 0
        rows = _ndjson(tmp_path / "lists" / "vip.ndjson")
        assert {row["key"] for row in rows} == {key_of(f"v{number}") for number in (0, 1, 2, 4, 5, 6)}
        people.lists = {"other": {}}
        sync.run(ledger, out, people, registry.Sending())
        assert _ndjson(tmp_path / "lists" / "vip.ndjson") == []


def test_a_check_of_files_writes_one_and_leaves_nothing(tmp_path: Path) -> None:
    kept = files.build("lists", files.Options(url=str(tmp_path / "lists"), purpose=Purpose.CRM))
    assert kept.check() == f"a file was written to file://{tmp_path / 'lists'}, and removed"
    assert list((tmp_path / "lists").iterdir()) == []
    memory = files.build("lists", files.Options(url="memory://checked", purpose=Purpose.CRM))
    assert memory.check() == "a file was written to memory:///checked, and removed"
    assert fsspec.filesystem("memory").find("/checked") == []


def test_a_check_of_files_fails_where_none_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("is no directory")
    with pytest.raises(Rejected, match="taken"):
        files.build("lists", files.Options(url=str(tmp_path / "taken" / "lists"), purpose=Purpose.CRM)).check()
    own = files.build("lists", files.Options(url="memory://checked", purpose=Purpose.CRM))

    def lost(*_: object, **__: object) -> None:
        raise LookupError("no credentials")

    monkeypatch.setattr(own._files, "open", lost)
    with pytest.raises(Rejected, match="LookupError: no credentials"):
        own.check()


# --- the file of destinations ---


def read(text: str, **environment: str) -> registry.File:
    return registry.read(text, "destinations.yaml", environment)


def test_destinations_are_built_from_the_file_with_secrets_from_the_environment() -> None:
    file = read(
        """
        destinations:
          ours: {kind: webhook, url: "https://${HOST}/hook", secret: "${HOOK_SECRET}", purpose: ads, patience_s: 60}
          lists: {kind: files, url: lists, purpose: crm, format: csv}
        """,
        HOST="hooks.example.com",
        HOOK_SECRET=SECRET,
    )
    ours = file.destination("ours").build()
    assert (ours.name, ours.purpose, ours.limits.members) == ("ours", Purpose.ADS, 1000)
    assert file.destination("ours").sending.patience_s == 60
    assert isinstance(file.destination("lists").build(), files.Files)
    assert SECRET not in repr(vars(ours))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "destinations.yaml:1: is empty or no mapping; write the keys destinations and triggers at the top"),
        ("destination: {}", "destinations.yaml:1: destination: unknown key; did you mean 'destinations'?"),
        ("destinations: [a]", "destinations.yaml:1: destinations: is no mapping; write a name"),
        ("destinations: {a: b}", "destinations.yaml:1: destinations.a: is no mapping; write its options below it"),
        (
            "destinations: {a: {url: b}}",
            "destinations.yaml:1: destinations.a.kind: is missing; write one of files, web",
        ),
        ("destinations: {a: {kind: [b]}}", "destinations.yaml:1: destinations.a.kind: is no kind; write one of files"),
        ("destinations: {a: {kind: fax}}", "destinations.yaml:1: destinations.a.kind: is no kind; write one of files"),
        (
            "destinations:\n  a: {\n    kind: file}",
            "destinations.yaml:3: destinations.a.kind: is no kind; did you mean",
        ),
        ("destinations: {a: &x {kind: files, more: *x}}", "destinations.yaml:1: destinations.a: is nested too deeply"),
        ("destinations:\n  a: {kind: meta}\n  a: {kind: files}", "destinations.yaml:3: 'a' is written twice; keep one"),
        (
            "destinations: {a: {kind: files, patience_s: x}}",
            "destinations.yaml:1: destinations.a.patience_s: Input should",
        ),
        (
            "destinations: {a: {kind: files, url: '${NONE}'}}",
            "destinations.yaml:1: destinations.a.url: the environment v",
        ),
    ],
)
def test_what_is_wrong_with_the_file_is_said_with_its_place(text: str, said: str) -> None:
    with pytest.raises(PropensityError) as error:
        read(text).destination("a")
    assert str(error.value).startswith(said)


def test_all_that_is_wrong_with_a_destination_is_said_at_once() -> None:
    text = """destinations:
  a:
    kind: webhok
    url: https://${HOST}/${PATH}
    patience_s: -1
"""
    with pytest.raises(PropensityError) as error:
        read(text).destination("a")
    assert str(error.value).splitlines() == [
        "destinations.yaml:4: destinations.a.url: the environment variable HOST is not set",
        "destinations.yaml:4: destinations.a.url: the environment variable PATH is not set",
        "destinations.yaml:3: destinations.a.kind: is no kind; did you mean 'webhook'?",
        "destinations.yaml:5: destinations.a.patience_s: Input should be greater than 0",
    ]
    text = """destinations:
  a:
    kind: files
    urll: lists
    format: xml
    pateince_s: 3
"""
    with pytest.raises(PropensityError) as error:
        read(text).destination("a").build()
    assert str(error.value).splitlines() == [
        "destinations.yaml:2: destinations.a.url: is missing; add it",
        "destinations.yaml:2: destinations.a.purpose: is missing; add it",
        "destinations.yaml:5: destinations.a.format: Input should be 'parquet', 'csv' or 'ndjson'",
        "destinations.yaml:4: destinations.a.urll: unknown key; did you mean 'url'?",
        "destinations.yaml:6: destinations.a.pateince_s: unknown key; did you mean 'patience_s'?",
    ]


def test_what_is_wrong_with_a_trigger_is_said_with_its_place() -> None:
    file = read("triggers:\n  sales:\n    url: https://x.example\n    secret: '${S}'\n    event: [a]\n", S=SECRET)
    with pytest.raises(PropensityError) as error:
        triggers.load(file)
    assert str(error.value) == "destinations.yaml:5: triggers.sales.event: unknown key; did you mean 'events'?"


def test_one_destination_or_trigger_needs_no_secrets_of_the_others() -> None:
    text = """
    destinations:
      lists: {kind: files, url: "${BUCKET}/lists", purpose: crm}
      ours: {kind: webhook, url: "https://x.example", secret: "${HOOK_SECRET}", purpose: ads}
    triggers:
      sales: {url: "https://x.example", secret: "${SALES_SECRET}"}
      mail: {url: "https://x.example", secret: "${MAIL_SECRET}"}
    """
    file = read(text, BUCKET="s3://ours", SALES_SECRET=SECRET)
    assert file.destination("lists").options["url"] == "s3://ours/lists"
    assert list(triggers.load(file, "sales")) == ["sales"]
    with pytest.raises(PropensityError, match="destinations.ours.secret: the environment variable HOOK_SECRET is not"):
        file.destination("ours")
    with pytest.raises(PropensityError, match="triggers.mail.secret: the environment variable MAIL_SECRET is not set"):
        triggers.load(file)


def test_a_secret_in_the_file_is_refused_and_not_repeated() -> None:
    file = read("destinations: {a: {kind: webhook, url: 'https://x.example', secret: whsec_abc, purpose: ads}}")
    with pytest.raises(PropensityError) as error:
        file.destination("a").build()
    assert str(error.value).startswith("destinations.yaml:1: destinations.a.secret: write ${NAME}, the name of an")
    assert "whsec_abc" not in str(error.value)


def test_an_unknown_destination_is_told_with_those_that_there_are() -> None:
    file = read("destinations: {a: {kind: files}, b: {kind: files}}")
    with pytest.raises(PropensityError, match="no destination 'c'; it has a, b"):
        file.destination("c")
    with pytest.raises(PropensityError, match="none.yaml: no such file; name the file of destinations"):
        registry.load(Path("none.yaml"))


def test_a_missing_library_is_told_with_the_extra_that_installs_it(tmp_path: Path) -> None:
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hubspot", "fsspec", "facebook_business", "google", "klaviyo_api"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from audiences.destinations import registry
file = registry.read("destinations: {a: {kind: files}}", "d.yaml", {})
try:
    file.destination("a").build()
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == (
        "PropensityError d.yaml:1: destinations.a: the kind files needs fsspec, which is not installed; "
        "install it with pip install 'propensity[audiences]'\n"
    ), done.stderr
