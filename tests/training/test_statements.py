"""What rows say of persons is read as it was written. What comes of it is in tests/cli/test_history.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training import relation, specfile, statements
from training.connection import connect

SPEC = "model: m\nevents: {v: {code: 1, event: V}}\nfeatures: {n: {count: any}}\n"
MAPPED = "source: {visitor_id: who, timestamp: at, event: {constant: V}, traits: {email: mail, phone: tel}}\n"


def read(path: Path, spec: str) -> list[dict[str, Any]]:
    workdir = path.parent / "work"
    workdir.mkdir(exist_ok=True)
    return list(statements.read(connect(workdir), [str(path)], specfile.read(spec, "spec.yaml")))


def test_numbers_and_countries_of_a_csv_stay_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relation, "_SNIFFED_ROWS", 2048)
    numbers = [str(22_000_000 + place) for place in range(3000)] + ["0047221234", "+4722123459"]
    lines = [f"v{place},2026-03-01T00:00:00Z,{number},NO" for place, number in enumerate(numbers)]
    file = tmp_path / "a.csv"
    file.write_text("\n".join(["who,at,tel,country", *lines]) + "\n")
    found = read(file, SPEC + MAPPED.replace("email: mail, ", ""))
    assert [event["traits"] for event in found] == [{"phone": number, "country": "NO"} for number in numbers]
    assert {event["type"] for event in found} == {"identify"}


def test_an_address_that_no_spec_maps_is_not_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("who,at,email,mail\nv,2026-03-01T00:00:00Z,a@example.com,\nw,2026-03-01T00:00:00Z,,b@example.com\n")
    (found,) = read(file, SPEC + MAPPED.replace(", phone: tel", ""))
    assert (found["userId"], found["traits"]) == ("w", {"email": "b@example.com"})
    assert read(file, SPEC + MAPPED.replace(", traits: {email: mail, phone: tel}", "")) == []


@pytest.mark.parametrize(
    "consent", ['{"categoryPreferences": {"ads": true}}', '{"categoryPreferences": {}}', "yes", ""]
)
def test_a_consent_may_be_a_column_of_json(tmp_path: Path, consent: str) -> None:
    file = tmp_path / "a.csv"
    quoted = consent.replace('"', '""')
    file.write_text(f'userId,timestamp,event,context.consent\nv,2026-03-01T00:00:00Z,V,"{quoted}"\n')
    found = read(file, SPEC)
    assert [str(event["context"]["consent"]) for event in found] == {
        "yes": [],
        "": [],
    }.get(consent, [consent.replace('"', "'").replace("true", "True")])


def test_where_of_a_spec_counts_here_too(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(
        "who,at,mail,tel,is_bot\nv,2026-03-01T00:00:00Z,a@example.com,,0\nw,2026-03-01T00:00:00Z,b@x.org,,1\n"
    )
    (found,) = read(file, SPEC + MAPPED.replace("{visitor_id", "{where: is_bot = 0, visitor_id"))
    assert found["userId"] == "v"
