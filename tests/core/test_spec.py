"""The feature spec: what it accepts, what it refuses and with which words, and that its hash means the same spec."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core import features, spec
from service.core.segments import SEGMENTS
from service.core.spec import FeatureSpec, InvalidSpec, parse

EVERYTHING: dict[str, Any] = {
    "model": "purchase_7d",
    "events": {
        "view": {"code": 1, "event": "Product Viewed", "value": "price", "attribute": "category"},
        "cart": {"code": 2, "event": "Product Added", "value": "price"},
        "purchase": {"code": 3, "event": "Order Completed", "value": "revenue"},
    },
    "limits": {"history": "90d", "records": 2048, "session_gap": "30m"},
    "label": {"event": "purchase", "horizon": "7d"},
    "rows": {"after": ["view", "cart"], "every": "1d", "per_visitor": 5, "cold_start": False},
    "source": {
        "files": "*.csv",
        "visitor_id": "CustomerID",
        "timestamp": "InvoiceDate",
        "event": {"constant": "Order Completed"},
        "properties": {"revenue": "Quantity * UnitPrice"},
    },
    "segments": {"champions": 0.1, "nurture": 0.3},
    "features": {
        "views_1h": {"count": "view", "window": "1h"},
        "spend": {"sum": "purchase", "window": "90d"},
        "mean_price": {"mean": ["view", "cart"]},
        "min_price": {"min": "view", "window": "1.5d"},
        "max_price": {"max": "view", "window": "7d"},
        "last_price": {"latest": "any"},
        "categories": {"distinct": "view", "window": "500ms"},
        "since": {"recency": "view"},
        "known": {"tenure": "any"},
        "session_views": {"count": "view", "window": "session"},
        "session_length": {"session": "duration"},
        "fading": {"decay": "view", "half_life": "36h"},
        "rate": {"ratio": ["spend", "views_1h"], "prior": [1, 20]},
        "rate_of_rate": {"ratio": ["rate", "views_1h"]},
        "hour": {"clock": "hour", "offset": "+05:30"},
        "device": {"trait": "device", "categories": ["mobile", "desktop"]},
        "tier": {"trait": "tier", "categories": {"gold": 3, "silver": 1.5}},
        "age": {"trait": "age"},
        "referrer": {"request": "referrer", "categories": ["search", 1, True]},
    },
}


def changed(place: str, value: object) -> dict[str, Any]:
    """`EVERYTHING` with one place, a path with slashes, set to a value."""
    document = copy.deepcopy(EVERYTHING)
    *way, last = place.split("/")
    section = document
    for key in way:
        section = section[key]
    section[last] = value
    return document


def refusal(document: object) -> str:
    with pytest.raises(InvalidSpec) as refused:
        parse(document)
    return str(refused.value)


def refers(message: str, *words: str) -> None:
    """The message names the place and what to write; it shows none of pydantic's inner names."""
    for word in words:
        assert word in message, message
    for inner in ("tuple[", "function-", "Value error", "type=", "https://", "FeatureSpec"):
        assert inner not in message, message


# --- What is accepted ---


def test_the_order_of_features_is_the_order_of_columns() -> None:
    assert parse(EVERYTHING).names == tuple(EVERYTHING["features"])


def test_durations_are_milliseconds() -> None:
    made = parse(EVERYTHING)
    assert made.limits.history == 90 * 86_400_000
    assert made.limits.session_gap == 30 * 60_000
    windows = {name: getattr(feature, "window", None) for name, feature in made.features.items()}
    assert windows["min_price"] == 36 * 3_600_000
    assert windows["categories"] == 500
    assert windows["session_views"] == "session"


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("1ms", 1), ("0.5s", 500), ("30m", 1_800_000), (" 2 h ", 7_200_000), ("1.5d", 129_600_000), ("2w", 1_209_600_000)],
)
def test_a_duration_is_a_number_and_a_unit(text: str, milliseconds: int) -> None:
    assert spec.parse_duration(text) == milliseconds


@settings(max_examples=100)
@given(st.integers(1, 36_500 * 86_400_000))
def test_a_written_duration_is_read_back_exactly(milliseconds: int) -> None:
    assert spec.parse_duration(spec.format_duration(milliseconds)) == milliseconds


def test_categories_of_numbers_and_truths_are_compared_as_text() -> None:
    of = {
        "listed": {"request": "r", "categories": [1, 2.0, 2.5, True]},
        "coded": {"request": "r", "categories": {0: 7}},
    }
    made = parse({"model": "m", "features": of})
    assert made.requests["listed"].codes == {"1": 0, "2": 1, "2.5": 2, "true": 3}
    assert made.requests["coded"].codes == {"0": 7}


def test_what_is_left_out_has_its_default() -> None:
    made = parse({"model": "m", "features": {"hour": {"clock": "hour"}}})
    assert (made.limits.history, made.limits.records, made.limits.session_gap) == (7_776_000_000, 2048, 1_800_000)
    assert (made.label, made.source, made.segments, made.events) == (None, (), {}, {})
    assert made.rows.after == ("any",)


def test_one_source_or_several_can_be_written() -> None:
    assert [source.visitor_id for source in parse(EVERYTHING).source] == ["CustomerID"]
    two = parse(changed("source", [{"visitor_id": "a", "event": "column"}, {"visitor_id": "b"}]))
    assert [source.visitor_id for source in two.source] == ["a", "b"]
    assert two.source[0].event is not None
    assert two.source[0].event.column == "column"


# --- What is refused, and with which words ---


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("feature", {}, ["feature:", "unknown key", "did you mean 'features'?"]),
        ("events/view/atribute", "x", ["events.view.atribute:", "unknown key", "'attribute'"]),
        ("limits/window", "1d", ["limits.window:", "unknown key", "history, records, session_gap"]),
        ("label/horizn", "7d", ["label.horizn:", "'horizon'"]),
        ("rows/per_visitr", 3, ["rows.per_visitr:", "'per_visitor'"]),
        ("fit", {"num_leafs": 7}, ["fit.num_leafs:", "'num_leaves'"]),
        ("source/visitor", "x", ["visitor:", "'visitor_id'"]),
        ("source/event/colunm", "x", ["event.colunm:", "'column'"]),
        ("features/views_1h/windw", "1h", ["features.views_1h.windw:", "unknown key", "'window'"]),
        ("features/rate/priors", [1, 1], ["features.rate.priors:", "'prior'"]),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(place: str, value: object, words: list[str]) -> None:
    refers(refusal(changed(place, value)), *words)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("events/cart/code", 1, ["events.cart.code:", "1 is already used by 'view'", "choose another"]),
        ("events/cart/event", "Product Viewed", ["events.cart.event:", "'Product Viewed' is already used by 'view'"]),
        ("events/cart/code", 0, ["events.cart.code:", "greater than or equal to 1"]),
        ("events/cart/code", 65_001, ["events.cart.code:", "less than or equal to 65000"]),
        ("events/cart/code", "2", ["events.cart.code:", "integer"]),
        ("events/cart/code", True, ["events.cart.code:", "integer"]),
        ("events/cart", {"event": "Product Added"}, ["events.cart.code:", "is missing; add it"]),
        ("events/any", {"code": 9, "event": "E"}, ["events.any:", "stands for all events", "choose another"]),
        ("events/a b", {"code": 9, "event": "E"}, ["events.a b"]),
        ("events", {f"k{code}": {"code": code, "event": f"E{code}"} for code in range(1, 252)}, ["events:", "250"]),
    ],
)
def test_a_catalogue_that_is_not_unique_or_not_codes_is_refused(place: str, value: object, words: list[str]) -> None:
    refers(refusal(changed(place, value)), *words)


@pytest.mark.parametrize(
    "place", ["events/cart/code", "limits/records", "limits/history", "features/tier/categories/gold"]
)
def test_a_number_of_thousands_of_digits_is_refused(place: str) -> None:
    refers(refusal(changed(place, 10**5000)), place.replace("/", "."))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("features/views_1h/count", "veiw", ["features.views_1h:", "no event 'veiw'", "did you mean 'view'?"]),
        ("features/mean_price/mean", ["view", "zzz"], ["features.mean_price:", "'zzz'", "view, cart, purchase"]),
        ("features/views_1h/count", [], ["features.views_1h.count:", "at least 1 item"]),
        ("rows/after", "visit", ["rows.after:", "no event 'visit'"]),
        ("label/event", "purchse", ["label.event:", "did you mean 'purchase'?"]),
        ("label", {"absent": "purchse", "horizon": "7d"}, ["label.absent:", "did you mean 'purchase'?"]),
        ("features/rate/ratio", ["spend", "view_1h"], ["features.rate:", "no feature 'view_1h'", "'views_1h'"]),
        ("features/rate/ratio", ["spend"], ["features.rate.ratio"]),
        ("features/rate/ratio", ["spend", "age", "hour"], ["features.rate.ratio"]),
    ],
)
def test_a_name_that_does_not_exist_is_refused_with_the_nearest(place: str, value: object, words: list[str]) -> None:
    refers(refusal(changed(place, value)), *words)


@pytest.mark.parametrize("ratio", [["rate", "spend"], ["spend", "rate"], ["rate_of_rate", "spend"], ["rate", "rate"]])
def test_a_ratio_built_from_itself_is_refused(ratio: list[str]) -> None:
    refers(refusal(changed("features/rate/ratio", ratio)), "features.rate:", "built from itself", "break the cycle")


def test_a_long_cycle_is_refused_and_what_only_leads_to_it_is_not_named() -> None:
    loop = {f"r{place}": {"ratio": [f"r{(place + 1) % 300}", "n"]} for place in range(300)}
    of = {**loop, "outside": {"ratio": ["r5", "n"]}, "n": {"clock": "hour"}}
    message = refusal({"model": "m", "features": of})
    refers(message, "features.r0:", "features.r299:", "break the cycle")
    assert "features.outside" not in message


def test_two_features_that_share_an_operand_are_no_cycle() -> None:
    of = {"a": {"ratio": ["b", "c"]}, "b": {"ratio": ["d", "d"]}, "c": {"ratio": ["d", "b"]}, "d": {"clock": "day"}}
    assert parse({"model": "m", "features": of}).names == ("a", "b", "c", "d")


@pytest.mark.parametrize("place", ["limits/history", "limits/session_gap", "label/horizon", "rows/every"])
@pytest.mark.parametrize(
    "value", ["7", 7, 7.5, "7 days", "-1d", "d", "", "1d2h", "1e3s", True, [], {}, "7D", "nan d", "inf d"]
)
def test_a_duration_without_number_and_unit_is_refused(place: str, value: object) -> None:
    message = refusal(changed(place, value))
    refers(message, f"{place.replace('/', '.')}:", "is not a duration", "30s, 30m, 1h, 7d or 2w")


@pytest.mark.parametrize(
    "value", ["0d", "0.4ms", "36501d", "9" * 400 + "d", "9" * 6000 + "ms", "0." + "0" * 400 + "1s"]
)
@pytest.mark.parametrize("place", ["limits/history", "features/views_1h/window", "features/fading/half_life"])
def test_a_duration_out_of_range_is_refused(place: str, value: str) -> None:
    refers(refusal(changed(place, value)), place.replace("/", "."), "out of range", "between 1ms and 36500d")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"cuont": "view"}, ["exactly one of the keys count, sum"]),
        ({}, ["exactly one of the keys"]),
        ({"count": "view", "sum": "view"}, ["exactly one of the keys"]),
        ("view", ["exactly one of the keys"]),
        (None, ["exactly one of the keys"]),
        ([], ["exactly one of the keys"]),
        ({"session": "length"}, ["features.new.session:", "'count' or 'duration'"]),
        ({"clock": "minute"}, ["features.new.clock:", "'hour', 'weekday', 'day' or 'month'"]),
        ({"clock": "hour", "offset": "2h"}, ["features.new.offset:"]),
        ({"clock": "hour", "offset": "+99:99"}, ["features.new.offset:"]),
        ({"clock": "hour", "offset": "+٠٩:٠٠"}, ["features.new.offset:"]),
        ({"decay": "view"}, ["features.new.half_life:", "is missing; add it"]),
        ({"decay": "view", "half_life": "session"}, ["features.new.half_life:", "is not a duration"]),
        ({"count": "view", "window": "sesion"}, ["features.new.window", "is not a duration"]),
        ({"count": 3}, ["features.new.count"]),
        ({"ratio": ["spend", "hour"], "prior": [-1, 0]}, ["features.new.prior.0:", "greater than or equal to 0"]),
        ({"ratio": ["spend", "hour"], "prior": [math.inf, 0]}, ["features.new.prior.0:", "write a finite number"]),
        ({"ratio": ["spend", "hour"], "prior": 1}, ["features.new.prior:"]),
        ({"trait": ""}, ["features.new.trait:", "at least 1 character"]),
        ({"trait": "t", "categories": ["a", "b", "a"]}, ["features.new.categories:", "listed twice", "list each once"]),
        ({"trait": "t", "categories": [1, "1"]}, ["features.new.categories:", "listed twice"]),
        ({"trait": "t", "categories": [1, 1.0]}, ["features.new.categories:", "listed twice"]),
        ({"trait": "t", "categories": {1: 2, "1": 3}}, ["features.new.categories:", "listed twice"]),
        ({"trait": "t", "categories": []}, ["features.new.categories:", "at least one"]),
        ({"request": "t", "categories": {}}, ["features.new.categories:", "at least one"]),
        ({"trait": "t", "categories": {"a": math.nan}}, ["features.new.categories", "write a finite number"]),
        ({"trait": "t", "categories": {"a": "many"}}, ["features.new.categories", "number"]),
        ({"trait": "t", "categories": "mobile"}, ["features.new.categories"]),
        ({"trait": "t", "categories": [None]}, ["features.new.categories"]),
        ({"request": "t", "categories": [["a"]]}, ["features.new.categories"]),
    ],
)
def test_a_feature_that_means_nothing_is_refused(value: object, words: list[str]) -> None:
    refers(refusal(changed("features/new", value)), "features.new", *words)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("model", "Purchase 7d", ["model:"]),
        ("model", "../escape", ["model:"]),
        ("model", "a\n", ["model:"]),
        ("model", None, ["model:"]),
        ("features", {}, ["features:", "at least 1 item"]),
        ("features", [], ["features:"]),
        ("features/1st", {"clock": "hour"}, ["features.1st"]),
        ("features/", {"clock": "hour"}, ["features."]),
        ("limits/records", 0, ["limits.records:", "greater than or equal to 1"]),
        ("limits/records", 2049, ["limits.records:", "less than or equal to 2048"]),
        ("limits/records", True, ["limits.records:", "integer"]),
        ("rows/per_visitor", 0, ["rows.per_visitor:"]),
        ("label", {"event": "purchase"}, ["label:", "needs a horizon", "horizon: 7d"]),
        ("label", {"absent": "purchase"}, ["label:", "needs a horizon", "horizon: 7d"]),
        ("label", {}, ["label:", "write one of event and horizon, absent and horizon, or column"]),
        ("label", {"event": "purchase", "horizon": "7d", "column": "y"}, ["label:", "write one of event"]),
        ("label", {"event": "purchase", "horizon": "7d", "absent": "view"}, ["label:", "write one of event"]),
        ("label", "purchase", ["label:"]),
        ("source", {"event": {}}, ["event:", "write either constant: EVENT NAME or column: COLUMN"]),
        ("source", {"event": {"constant": "a", "column": "b"}}, ["event:", "write either constant"]),
        ("source", 7, ["source:"]),
        ("segments", {"best": 0.1}, ["segments.best:", *SEGMENTS[:-1]]),
        ("segments", {"low_priority": 0.1}, ["segments.low_priority:", "is not a segment with a share"]),
        ("segments", {"champions": 0}, ["segments.champions:", "greater than 0"]),
        ("segments", {"champions": 1}, ["segments.champions:", "less than 1"]),
        ("segments", {"champions": 0.6, "nurture": 0.4}, ["segments:", "leave a rest for low_priority"]),
    ],
)
def test_a_section_that_cannot_be_used_is_refused(place: str, value: object, words: list[str]) -> None:
    refers(refusal(changed(place, value)), *words)


@pytest.mark.parametrize("document", [None, [], "model: m", 3, True, {}])
def test_what_is_no_mapping_with_a_model_and_features_is_refused(document: object) -> None:
    refers(refusal(document), "model" if document == {} else "mapping")


def test_every_problem_is_named_at_once() -> None:
    document = changed("limits/history", "90")
    document["features"]["hour"] = {"clock": "minute"}
    document["evnts"] = {}
    refers(refusal(document), "limits.history:", "features.hour.clock:", "evnts: unknown key; did you mean 'events'?")


# --- The round trip and the hash ---


def again(made: FeatureSpec) -> FeatureSpec:
    """The spec as a bundle's manifest gives it back."""
    return parse(json.loads(json.dumps(made.model_dump(mode="json"), allow_nan=False)))


def test_a_spec_survives_json_with_its_hash() -> None:
    made = parse(EVERYTHING)
    back = again(made)
    assert back == made
    assert back.hash == made.hash
    assert again(back).model_dump() == made.model_dump()


def test_the_hash_is_pinned() -> None:
    assert parse(EVERYTHING).hash == "6df78f63376b461d64e71dcb071a12cf2ca0567dc96feccb150c4a797e5efcdf"


def test_a_different_way_of_writing_the_same_spec_has_the_same_hash() -> None:
    document = changed("limits", {"history": "2160h", "session_gap": "1800s"})
    document["features"]["views_1h"] = {"window": "60m", "count": ["view"]}
    document["features"]["hour"]["offset"] = "+05:30"
    document["label"] = {"horizon": "1w", "event": "purchase"}
    assert parse(document).hash == parse(EVERYTHING).hash


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("features/views_1h/window", "2h"),
        ("features/views_1h/count", "cart"),
        ("features/rate/prior", [1, 21]),
        ("features/tier/categories/gold", 4),
        ("features/device/categories", ["desktop", "mobile"]),
        ("features/hour/offset", "+05:00"),
        ("features/new", {"clock": "day"}),
        ("events/view/code", 4),
        ("events/view/value", None),
        ("limits/history", "89d"),
        ("limits/records", 2047),
        ("limits/session_gap", "31m"),
        ("label/horizon", "8d"),
        ("rows/cold_start", True),
        ("model", "other"),
    ],
)
def test_whatever_decides_a_value_or_a_row_changes_the_hash(place: str, value: object) -> None:
    assert parse(changed(place, value)).hash != parse(EVERYTHING).hash


def test_the_order_of_the_columns_changes_the_hash() -> None:
    reversed_columns = dict(reversed(EVERYTHING["features"].items()))
    assert parse(changed("features", reversed_columns)).hash != parse(EVERYTHING).hash


@pytest.mark.parametrize(
    ("place", "value"),
    [("source", {"files": "*.parquet"}), ("segments", {"champions": 0.2}), ("fit", {"num_leaves": 7})],
)
def test_where_data_came_from_how_it_was_fitted_and_how_scores_are_named_do_not_change_the_hash(
    place: str, value: object
) -> None:
    assert parse(changed(place, value)).hash == parse(EVERYTHING).hash


# --- Anything at all ---

keys = st.sampled_from(
    [
        *("model", "events", "limits", "label", "rows", "source", "segments", "features", "code", "event", "value"),
        *("attribute", "history", "records", "session_gap", "horizon", "column", "positive", "after", "every"),
        *("count", "sum", "window", "session", "decay", "half_life", "ratio", "prior", "clock", "offset", "trait"),
        *("request", "categories", "constant", "names", "properties", "view", "any", "champions", "x", "", "a.b", "0"),
    ]
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, 10**400, 2**63, 1, 0]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["7d", "session", "any", "view", "hour", "+00:00", "9" * 400 + "d", "\ud800", "\x00", "1" * 5000]),
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(keys | st.text(max_size=4) | st.just("\ud800"), inner, max_size=5)
        | st.dictionaries(scalars.filter(lambda key: key == key), inner, max_size=2)
    ),
    max_leaves=12,
)


def only_a_refusal(document: object) -> None:
    try:
        made = parse(document)
    except InvalidSpec as refused:
        assert str(refused)
    else:
        features.compile(made)
        assert again(made).hash == made.hash


@settings(max_examples=300)
@given(anything)
def test_any_document_is_a_spec_or_is_refused(document: object) -> None:
    only_a_refusal(document)


def _places(section: object, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [way]
    if isinstance(section, dict):
        for key, inner in section.items():
            found += _places(inner, (*way, key))
    if isinstance(section, list):
        for index, inner in enumerate(section):
            found += _places(inner, (*way, index))
    return found


@settings(max_examples=500)
@given(st.data())
def test_a_spec_with_anything_at_some_place_is_a_spec_or_is_refused(data: st.DataObject) -> None:
    document = copy.deepcopy(EVERYTHING)
    *way, last = data.draw(st.sampled_from(_places(EVERYTHING)[1:]))
    section: Any = document
    for key in way:
        section = section[key]
    change = data.draw(st.sampled_from(["replace", "add", "remove"]))
    if change == "replace":
        section[last] = data.draw(anything)
    elif change == "remove":
        del section[last]
    elif isinstance(section, dict):
        section[data.draw(keys | st.text(max_size=4))] = data.draw(anything)
    only_a_refusal(document)


@settings(max_examples=150)
@given(st.one_of(st.text(max_size=12), scalars))
def test_any_duration_is_milliseconds_or_is_refused(text: object) -> None:
    try:
        milliseconds = spec.parse_duration(text)
    except ValueError as refused:
        assert "write" in str(refused)
    else:
        assert spec.parse_duration(spec.format_duration(milliseconds)) == milliseconds
