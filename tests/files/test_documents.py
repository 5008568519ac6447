"""Documents as people write them, and as nobody should."""

from __future__ import annotations

import random
import time

import pytest
import yaml

from audiences import definitions
from audiences.destinations import registry
from files import documents
from files.documents import Kind
from service.core.errors import PropensityError
from training import specfile

KIND = Kind(PropensityError, "write one", "write something")


def content(text: str) -> dict[str, object]:
    return documents.read(text, "a.yaml", KIND).content


def refusal(text: str) -> str:
    with pytest.raises(PropensityError) as told:
        content(text)
    return str(told.value)


def test_keys_are_merged_as_by_pyyaml_and_in_its_order() -> None:
    chance = random.Random(0)
    for _ in range(300):
        lines: list[str] = []
        for number in range(chance.randint(2, 7)):
            parts = [f"{key}: v{number}" for key in chance.sample("abcdefg", chance.randint(0, 4))]
            if number and chance.random() < 0.7:
                names = [f"*m{place}" for place in chance.sample(range(number), chance.randint(1, min(3, number)))]
                parts.insert(chance.randint(0, len(parts)), f"<<: [{', '.join(names)}]")
            lines.append(f"m{number}: &m{number} {{{', '.join(parts)}}}\n")
        text = "".join(lines)
        assert repr(content(text)) == repr(yaml.safe_load(text)), text


def test_a_mapping_that_is_merged_before_it_is_built_may_replace_what_it_merges() -> None:
    text = "x: {y: {b: &b {<<: &c {code: 1}, code: 2}}}\na: {<<: *b}\n"
    assert content(text) == {"x": {"y": {"b": {"code": 2}}}, "a": {"code": 2}}
    assert refusal("x: {y: {b: &b {code: 1, code: 2}}}\na: {<<: *b}\n") == "a.yaml:1: 'code' is written twice; keep one"


@pytest.mark.parametrize("merged", ["1", "[1]", "", "[[]]"])
def test_what_is_no_mapping_is_not_merged(merged: str) -> None:
    assert refusal(f"a:\n  <<: {merged}\n") == "a.yaml:2: << takes a mapping or a list of mappings, as *NAME"


MERGES = "audiences: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 20)
)
ALIASES = "destinations:\n  a0: &a0 {kind: files, url: $HOME}\n" + "".join(
    f"  a{level}: &a{level} {{kind: files, {', '.join(f'k{place}: *a{level - 1}' for place in range(9))}}}\n"
    for level in range(1, 20)
)


def test_merges_of_merges_are_each_looked_at_once() -> None:
    begun = time.monotonic()
    assert content(MERGES)["a19"] == {"x": 1}
    for reader in (specfile.read, definitions.read, lambda text, name: registry.read(text, name, {})):
        with pytest.raises(PropensityError, match=r"a.yaml:2: a1: unknown key"):
            reader(MERGES, "a.yaml")
    assert time.monotonic() - begun < 2


def test_more_keys_than_a_document_can_want_are_not_merged() -> None:
    base = f"a: &a {{{', '.join(f'k{place}: 1' for place in range(1000))}}}\n"
    begun = time.monotonic()
    assert len(content(base + "".join(f"b{place}: {{<<: *a}}\n" for place in range(99)))) == 100
    many = f"b: {{<<: [{', '.join(['*a'] * 50_000)}]}}\n"
    assert refusal(base + many) == "a.yaml:2: more than 100,000 keys are merged by <<; merge less, or less often"
    assert time.monotonic() - begun < 20


def test_a_destination_that_aliases_make_endless_is_refused_at_once() -> None:
    begun = time.monotonic()
    with pytest.raises(PropensityError) as told:
        registry.read(ALIASES, "a.yaml", {}).destination("a19").build()
    assert "a.yaml:21: destinations.a19.k0: unknown key" in str(told.value)
    assert time.monotonic() - begun < 2


def test_a_variable_that_aliases_repeat_is_told_once() -> None:
    text = "destinations:\n  a:\n    kind: files\n    one: &one {x: '${NOWHERE}'}\n    two: *one\n"
    with pytest.raises(PropensityError) as told:
        registry.read(text, "a.yaml", {}).destination("a")
    assert str(told.value) == "a.yaml:4: destinations.a.one.x: the environment variable NOWHERE is not set"
