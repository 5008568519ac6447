"""Spec files: what a person writes is what is meant, and every refusal names its line."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from service.core.spec import InvalidSpec, Trait
from training import specfile

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE = """model: shop
events:
  view: {code: 1, event: Product Viewed}
features:
  views: {count: view}
"""


def refusal(text: str) -> str:
    with pytest.raises(InvalidSpec) as caught:
        specfile.read(text, "spec.yaml")
    return str(caught.value)


def categories(written: str) -> tuple[str, ...]:
    feature = specfile.read(f"{BASE}  trait: {{trait: t, categories: [{written}]}}\n", "spec.yaml").features["trait"]
    assert isinstance(feature, Trait)
    assert isinstance(feature.categories, tuple)
    return feature.categories


def test_a_file_gives_the_spec_that_it_says(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(BASE, encoding="utf-8")
    spec = specfile.load(path)
    assert (spec.model, spec.names, spec.events["view"].event) == ("shop", ("views",), "Product Viewed")


def test_the_examples_are_valid() -> None:
    examples = sorted(path for path in EXAMPLES.glob("*.yaml") if path.name != "audiences.yaml")
    assert len(examples) >= 7
    for path in examples:
        assert specfile.load(path).features


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert specfile.load(path).names == ("views",)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (BASE + "limts: {}\n", 6, "limts: unknown key; did you mean 'limits'?"),
        (BASE + "  carts: {count: cart}\n", 6, "features.carts: no event 'cart' in the catalogue"),
        (BASE + "  carts:\n    count: view\n    windw: 7d\n", 8, "features.carts.windw: unknown key"),
        (BASE + "  week: {count: view, window: 7 dayz}\n", 6, "features.week.window: '7 dayz' is not a duration"),
        (BASE.replace("code: 1", "code: one"), 3, "events.view.code: input should be a valid integer"),
        (BASE + "  t:\n    trait: t\n    categories:\n      - a\n      - null\n", 10, "features.t.categories.1: "),
        (BASE + "source:\n  - files: a\n  - fles: b\n", 8, "source.1.fles: unknown key; did you mean 'files'?"),
        (BASE + "  a: {ratio: [a, views]}\n", 6, "features.a: the ratio is built from itself"),
        (BASE + "rows:\n  per_visitor: 0\n", 7, "rows.per_visitor: input should be greater than or equal to 1"),
        ("events: {}\nfeatures: {hour: {clock: hour}}\n", 1, "model: is missing; add it"),
        ("model: [shop\n", 2, "expected ',' or ']'"),
        ("model: shop\n\tfeatures: x\n", 2, "found character '\\t' that cannot start any token"),
        (BASE + "rows: {after: 'view}\n", 7, "found unexpected end of stream"),
        (BASE + "label: *target\n", 6, "found undefined alias 'target'"),
        (BASE + "---\nmodel: other\n", 6, "but found another document"),
        (BASE + "label: {event: view, horizon: \x07}\n", 6, "the character '\\x07' cannot stand in YAML"),
        (BASE + "? [a, b]\n: c\n", 6, "found unhashable key"),
    ],
)
def test_a_refusal_names_the_file_the_line_the_place_and_what_is_wrong(text: str, line: int, said: str) -> None:
    told = refusal(text)
    assert told.startswith(f"spec.yaml:{line}: ")
    assert said in told


def test_each_problem_has_a_line_of_its_own() -> None:
    told = refusal(BASE + "  a: {count: x}\nrows: {after: y}\n").splitlines()
    assert [re.sub(r": no event.*", "", line) for line in told] == [
        "spec.yaml:6: features.a",
        "spec.yaml:7: rows.after",
    ]


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        (BASE + "  views: {sum: view}\n", 6, "views"),
        (BASE + "model: again\n", 6, "model"),
        (BASE + "  t: {trait: t, categories: {1: 0, '1': 1}}\n", 6, "1"),
        (BASE.replace("code: 1", "code: 1, code: 2"), 3, "code"),
    ],
)
def test_a_key_that_is_written_twice_is_refused_where_it_is_repeated(text: str, line: int, key: str) -> None:
    assert refusal(text) == f"spec.yaml:{line}: {key!r} is written twice; keep one"


@pytest.mark.parametrize(
    "name",
    [
        *("no", "yes", "on", "off", "y", "n", "No", "ON", "TRUE", "False"),
        *("2024-01-31", "2024-01-31T10:00:00Z", "1:30", "12:30:45", "-1:30", "190:20:30.15"),
        *("007", "010", "1_000", "0x1F", "0o17", "0b11", "+5", "1e3", "=", ".inf", ".nan", "685_230.15"),
    ],
)
def test_what_version_1_1_takes_for_something_else_stays_the_name_that_is_written(name: str) -> None:
    assert categories(name) == (name,)


def test_numbers_and_true_and_false_are_named_as_json_has_them() -> None:
    assert categories("1, -2, 0, 2.50, true, false") == ("1", "-2", "0", "2.5", "true", "false")


def test_names_of_models_events_and_columns_stay_text() -> None:
    spec = specfile.read(
        "model: 2024-01-31\n"
        "events: {on: {code: 1, event: 1:30, attribute: no}}\n"
        "label: {column: off, positive: [yes, 1, true]}\n"
        "source: {visitor_id: no, event: {column: on, names: {007: 1:30, no: y}}}\n"
        "features: {off: {count: on}, zone: {clock: hour, offset: +10:30}}\n",
        "spec.yaml",
    )
    assert (spec.model, list(spec.events), spec.events["on"].event) == ("2024-01-31", ["on"], "1:30")
    assert spec.events["on"].attribute == "no"
    assert spec.label is not None
    assert (spec.label.column, spec.label.positive) == ("off", ("yes", "1", "true"))
    assert spec.source[0].event is not None
    assert spec.source[0].event.names == {"007": "1:30", "no": "y"}
    assert spec.names == ("off", "zone")


def test_numbers_may_be_written_with_an_exponent() -> None:
    read = specfile.read(BASE + "  rate: {ratio: [views, views], prior: [1, 1e3]}\n", "spec.yaml")
    assert getattr(read.features["rate"], "prior", None) == (1.0, 1000.0)


def test_anchors_and_merges_spare_repetition_and_keep_their_lines() -> None:
    events = "events:\n  view: &view {code: 1, event: V, value: price}\n  cart:\n    <<: *view\n    code: 2\n"
    spec = specfile.read(f"model: m\n{events}    event: C\nfeatures: {{n: {{count: any}}}}\n", "spec.yaml")
    assert spec.events["cart"].value == "price"
    assert spec.events["cart"].code == 2
    told = refusal(f"model: m\n{events}    event: C\n    cod: 3\nfeatures: {{n: {{count: any}}}}\n")
    assert told.startswith("spec.yaml:8: events.cart.cod: unknown key")


def bomb(levels: int, form: str) -> str:
    opened, closed = {"list": ("[", "]"), "map": ("{", "}")}[form]
    text = f"a0: &a0 {opened}{'' if form == 'list' else 'x: 1'}{closed}\n"
    for level in range(1, levels):
        inner = [f"{f'k{place}: ' if form == 'map' else ''}*a{level - 1}" for place in range(9)]
        text += f"a{level}: &a{level} {opened}{', '.join(inner)}{closed}\n"
    return text


@pytest.mark.parametrize("form", ["list", "map"])
@pytest.mark.parametrize("place", ["features: *a19\n", "features: {x: {trait: t, categories: *a19}}\n"])
def test_a_bomb_of_anchors_is_refused_at_once(form: str, place: str) -> None:
    begun = time.monotonic()
    told = refusal(f"model: m\n{bomb(20, form)}{place}")
    assert time.monotonic() - begun < 2
    assert len(told) < 20_000


@pytest.mark.parametrize("text", ["features: &a {x: *a}\n", "features: {x: {trait: t, categories: &a [*a]}}\n"])
def test_an_anchor_that_holds_itself_is_refused(text: str) -> None:
    assert refusal("model: m\n" + text).startswith("spec.yaml:2: features.x")


def test_nesting_without_end_is_refused() -> None:
    assert refusal("model: " + "[" * 5000 + "]" * 5000) == "spec.yaml:1: is nested too deeply to be read"


def test_tags_that_would_run_code_are_refused(tmp_path: Path) -> None:
    told = refusal(f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    assert told.startswith("spec.yaml:1: could not determine a constructor")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "~\n", "hello\n", "- a\n- b\n", "{}\n"])
def test_an_empty_file_is_told_how_to_begin(text: str) -> None:
    told = refusal(text)
    assert told.startswith("spec.yaml:1: ")
    assert "model" in told
    assert "features" in told


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"none\.yaml: no such file; give the feature spec with --spec FILE"):
        specfile.load(tmp_path / "none.yaml")


def test_a_file_that_is_not_utf_8_and_a_directory_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("model: größe\n".encode("latin-1"))
    for unreadable in (path, tmp_path):
        with pytest.raises(InvalidSpec, match=r"cannot be read as UTF-8 text"):
            specfile.load(unreadable)
