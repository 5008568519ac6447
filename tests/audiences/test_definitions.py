"""Definitions of audiences: what may be written, and what is said of anything else, with its line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from audiences import definitions
from audiences.definitions import InvalidDefinitions
from service.core import spec
from tests.conftest import SHOP
from training import specfile

ROOT = Path(__file__).parents[2]
SPECS = {"shop": spec.parse(SHOP), "churn": spec.parse({**SHOP, "model": "churn"})}


def complaint(text: str) -> str:
    with pytest.raises(InvalidDefinitions) as told:
        definitions.read(text, "a.yaml")
    return str(told.value)


def test_the_example_is_valid_for_the_shop_that_make_run_makes() -> None:
    read = definitions.load(ROOT / "examples" / "audiences.yaml")
    read.check({"purchase_7d": specfile.load(ROOT / "examples" / "shop.yaml")})
    assert len(read.audiences) >= 8


def test_defaults_count_where_an_audience_says_nothing() -> None:
    read = definitions.read(
        "defaults: {model: m, margin: 0.1, min_stay: 2d, min_size: 7, purpose: crm}\n"
        "audiences: {a: {cut: 0.1}, b: {cut: 0.1, model: n, margin: 0, min_stay: 0, min_size: 1, purpose: ads}}",
        "a.yaml",
    )
    a, b = read.audiences["a"], read.audiences["b"]
    assert (a.model, a.margin, a.min_stay, a.min_size, a.purpose) == ("m", 0.1, 172_800_000, 7, "crm")
    assert (b.model, b.margin, b.min_stay, b.min_size, b.purpose) == ("n", 0, 0, 1, "ads")
    assert read.models == ("m", "n")


def test_segments_move_by_their_own_rules_or_the_defaults() -> None:
    read = definitions.read(
        "defaults: {margin: 0.1, min_stay: 2d}\nsegments: {m: {margin: 0.3}}\naudiences: {a: {}}", "a.yaml"
    )
    assert (read.rules("m").margin, read.rules("m").min_stay) == (0.3, 172_800_000)
    assert (read.rules("n").margin, read.rules("n").min_stay) == (0.1, 172_800_000)


def test_an_audience_comes_after_those_that_it_excludes() -> None:
    read = definitions.read("audiences: {a: {exclude: [b, c]}, b: {exclude: c}, c: {}}", "a.yaml")
    assert [one.name for one in read.ordered] == ["c", "b", "a"]


def test_what_is_written_is_what_is_kept() -> None:
    text = (
        "audiences: {a: {description: Best, model: m, top: 5%, where: {f: {is: [1, x], below: 2d}}, exclude: b, "
        "holdout: 10%, destinations: google, purpose: ads}, b: {}}"
    )
    written = json.loads(definitions.read(text, "a.yaml").audiences["a"].written())
    assert written == {
        "description": "Best",
        "model": "m",
        "top": "5%",
        "where": {"f": {"below": 172800.0, "is": [1, "x"]}},
        "exclude": ["b"],
        "holdout": {"share": "10%", "salt": "a"},
        "margin": 0.5,
        "min_stay": 0,
        "min_size": 100,
        "purpose": "ads",
        "destinations": ["google"],
    }


def test_a_budget_pays_for_whole_contacts() -> None:
    for spend, each, contacts in ((10_000, 0.4, 25_000), (0.3, 0.1, 3), (1, 0.3, 3), (0.999, 0.333, 3)):
        assert definitions.Budget(spend=spend, per_contact=each).contacts == contacts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "1: is empty or no mapping; begin with audiences:"),
        ("[1]", "1: is empty or no mapping; begin with audiences:"),
        ("audiences: {", "1: "),
        ("audiences: {a: {}, a: {}}", "1: 'a' is written twice; keep one"),
        ("defaults: {}", "1: audiences: is missing; add it"),
        ("audiences: {}", "1: audiences: holds nothing; write at least one"),
        ("audiences:\n  a: 3", "2: audiences.a: is no mapping; write key: value pairs"),
        ("audiences: {A: {}}", "1: audiences.A: 'A' is no name; write lower-case letters, digits, _ and -, 56 at"),
        ("audiences:\n  a:\n    segmnt: champions", "3: audiences.a.segmnt: unknown key; did you mean 'segment'?"),
        ("defaults: {mrgin: 1}\naudiences: {a: {}}", "1: defaults.mrgin: unknown key; did you mean 'margin'?"),
        (
            "audiences: {a: {scores: {m: {at_most: 0.5}}}}",
            "1: audiences.a.scores.m.at_most: unknown key; did you mean 'below'?",
        ),
        ("audiences: {a: {where: {f: {belw: 1}}}}", "1: audiences.a.where.f.belw: unknown key; did you mean 'below'?"),
        ("audiences: {a: {segment: champion}}", "1: audiences.a.segment: no segment 'champion'; did you mean"),
        ("audiences: {a: {segment: champions}}", "1: audiences.a.segment: of which model? Write model: NAME here"),
        ("audiences: {a: {where: {f: 1}}}", "1: audiences.a.where.f: of which model? Write model: NAME here or in"),
        ("audiences: {a: {model: m, cut: 2}}", "1: audiences.a.cut.at: input should be less than 1"),
        ("audiences: {a: {model: m, cut: {enter: 0.2}}}", "1: audiences.a.cut: write either a number, or enter and"),
        ("audiences: {a: {model: m, cut: {enter: 0.1, leave: 0.2}}}", "1: audiences.a.cut: leave 0.2 is above enter"),
        ("audiences: {a: {model: m, top: 0.05}}", "1: audiences.a.top: 0.05 is neither a number of visitors nor a"),
        ("audiences: {a: {model: m, top: 0}}", "1: audiences.a.top: 0 is neither a number of visitors nor a share"),
        ("audiences: {a: {model: m, top: 101%}}", "1: audiences.a.top: '101%' is no share; write a number above 0"),
        ("audiences: {a: {model: m, top: 5, cut: 0.1}}", "1: audiences.a: chooses by cut and by top; keep one of"),
        ("audiences: {a: {model: m, budget: {spend: 1, per_contact: 2}}}", "1: audiences.a.budget: spend pays for no"),
        ("audiences: {a: {model: m, budget: {spend: 1}}}", "1: audiences.a.budget.per_contact: is missing; add it"),
        ("audiences: {a: {where: {m/f: {}}}}", "1: audiences.a.where.m/f: says nothing; write one of at_least,"),
        ("audiences: {a: {where: {m/f: {below: soon}}}}", "1: audiences.a.where.m/f.below: 'soon' is not a duration;"),
        ("audiences: {a: {last_event: {within: 7}}}", "1: audiences.a.last_event.within: 7 is not a duration; write"),
        ("audiences: {a: {last_event: {}}}", "1: audiences.a.last_event: says nothing; write one of within,"),
        ("audiences: {a: {last_event: {within: 1d, older_than: 2d}}}", "1: audiences.a.last_event: no event is older"),
        ("audiences: {a: {scores: {m: {}}}}", "1: audiences.a.scores.m: says nothing; write one of at_least, below"),
        ("audiences: {a: {holdout: 0.1}}", "1: audiences.a.holdout.share: 0.1 is no share; write a number above 0"),
        ("audiences: {a: {holdout: 100%}}", "1: audiences.a.holdout: holds everybody out; write less than 100%"),
        ("audiences: {a: {exclude: b}}", "1: audiences.a.exclude: no audience 'b'; write one of a"),
        ("audiences: {a: {exclude: a}}", "1: audiences.a.exclude: a excludes a; break the cycle"),
        ("audiences: {a: {exclude: b}, b: {exclude: a}}", "1: audiences.a.exclude: a excludes b excludes a; break"),
        ("audiences: {a: {min_size: 0}}", "1: audiences.a.min_size: input should be greater than or equal to 1"),
        ("audiences: {a: {min_stay: -1d}}", "1: audiences.a.min_stay: '-1d' is not a duration; write a number and"),
        ("audiences: {a: {purpose: fun}}", "1: audiences.a.purpose: input should be 'ads', 'email', 'crm' or"),
        ("audiences: {a: {destinations: google}}", "1: audiences.a.destinations: get only who agreed to a purpose;"),
        ("audiences: {a: {micro: x}}", "1: audiences.a: micro divides a segment; write segment: NAME as well"),
        ("audiences: {a: {model: m, segment: champions, micro: x}}", "1: audiences.a.micro: no micro-segment 'x' in"),
        ("segments: {m: {micro: {champion: {}}}}\naudiences: {a: {}}", "1: segments.m.micro: no segment 'champion';"),
        ("audiences:\n  a: {top: !!int x}", "2: invalid literal for int() with base 10: 'x'"),
        ("audiences:\n  a: {top: " + "9" * 5000 + "}", "2: Exceeds the limit (4300 digits) for integer string"),
        ("audiences: {a: {model: m, top: NINES}}", "1: audiences.a.top: 99999999999999999999999999999999999999999999"),
        ("audiences: {a: {model: m, budget: {spend: 1.0e300, per_contact: 0.1}}}", "1: audiences.a.budget: spend pays"),
        ("audiences: {a: {min_size: NINES}}", "1: audiences.a.min_size: input should be less than or equal to 100000"),
        ("audiences: {a: {where: {m/f: NINES}}}", "1: audiences.a.where.m/f.is: write numbers that a feature can have"),
        ("audiences: {a: {where: {m/f: {below: 1.0e39}}}}", "1: audiences.a.where.m/f.below: input should be less"),
        ('audiences: {a: {description: "\\ud800"}}', "1: audiences.a.description: holds half a character; write it"),
        ('audiences: {a: {holdout: {share: 5%, salt: "\\ud800"}}}', "1: audiences.a.holdout.salt: holds half a"),
        (
            "segments: {m: {micro: {champions: {rest: {f: 1}}}}}\naudiences: {a: {}}",
            "1: segments.m.micro: 'rest' of champions is whom no rule describes; choose another name",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line_and_what_to_write(text: str, said: str) -> None:
    text = text.replace("NINES", "9" * 400)
    assert complaint(text).startswith(f"a.yaml:{said}")


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in itertools.pairwise("abcdef")
)


@pytest.mark.parametrize("key", ["top", "min_stay", "holdout", "segment", "exclude", "cut", "budget"])
def test_a_list_that_aliases_make_endless_is_refused_in_few_words(key: str) -> None:
    said = complaint(f"{ALIASES}audiences: {{v: {{model: m, {key}: *f}}}}")
    assert f": audiences.v.{key}" in said
    assert len(said) < 2_000


def test_every_problem_is_told_at_once() -> None:
    told = complaint("audiences:\n  a: {cut: 2}\n  b: {segmnt: x}\n").splitlines()
    assert [line.partition(": ")[0] for line in told] == ["a.yaml:2", "a.yaml:3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "audiences: {a: {model: shp, cut: 0.1}}",
            "1: audiences.a.model: no scores of a model 'shp'; did you mean",
        ),
        (
            "audiences: {a: {scores: {nps: {below: 0.1}}}}",
            "1: audiences.a.scores.nps: no scores of a model 'nps'; ",
        ),
        (
            "audiences: {a: {where: {nps/f: 1}}}",
            "1: audiences.a.where.nps/f: no scores of a model 'nps'; write one",
        ),
        (
            "audiences: {a: {where: {churn/f: 1}}}",
            "1: audiences.a.where.churn/f: model churn has no feature 'f'",
        ),
        (
            "audiences: {a: {where: {churn/device: mobil}}}",
            "1: audiences.a.where.churn/device: no category 'mobil'; did you mean 'mobile'?",
        ),
        (
            "audiences: {a: {where: {churn/views_1d: many}}}",
            "1: audiences.a.where.churn/views_1d: 'many': the feature has no categories; write a number",
        ),
        (
            "audiences: {a: {where: {churn/device: {below: 1}}}}",
            "1: audiences.a.where.churn/device: categories have no order; write is: or is_not: with some of",
        ),
        ("segments: {nps: {}}\naudiences: {a: {}}", "1: segments.nps: no scores of a model 'nps'; write one of"),
        (
            "segments: {shop: {micro: {nurture: {x: {devic: mobile}}}}}\naudiences: {a: {}}",
            "1: segments.shop.micro.nurture.x.devic: model shop has no feature 'devic'; did you mean 'device'?",
        ),
    ],
)
def test_what_does_not_fit_the_models_is_said_with_its_line(text: str, said: str) -> None:
    with pytest.raises(InvalidDefinitions) as told:
        definitions.read(text, "a.yaml").check(SPECS)
    assert str(told.value).startswith(f"a.yaml:{said}")


def test_the_features_that_conditions_look_at_are_known() -> None:
    read = definitions.read(
        "defaults: {model: shop}\nsegments: {shop: {micro: {nurture: {x: {views_1d: 1}}}}}\n"
        "audiences: {a: {where: {device: mobile, churn/loyalty: 1}}}",
        "a.yaml",
    )
    read.check(SPECS)
    assert read.features("shop") == ("device", "views_1d")
    assert read.features("churn") == ("loyalty",)


def test_a_file_that_is_not_there_is_told_with_the_option(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidDefinitions, match=r"none.yaml: no such file; give the definitions with --definitions FILE"
    ):
        definitions.load(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidDefinitions, match="cannot be read as UTF-8 text"):
        definitions.load(tmp_path / "bytes.yaml")
