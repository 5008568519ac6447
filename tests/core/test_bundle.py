"""Bundles: a sealed one loads and scores; a damaged one is refused with the name of the file and what to do."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from service.core import bundle, events, features
from service.core.bundle import Bundle, InvalidBundle
from service.core.segments import SEGMENTS
from service.core.spec import FeatureSpec, parse

NOW_MS = 1_700_000_000_000
SPEC: dict[str, Any] = {
    "model": "purchase_7d",
    "events": {
        "view": {"code": 1, "event": "Product Viewed", "value": "price"},
        "cart": {"code": 2, "event": "Product Added"},
    },
    "features": {
        "views": {"count": "view", "window": "7d"},
        "carts": {"count": "cart", "window": "7d"},
        "rate": {"ratio": ["carts", "views"]},
        "device": {"trait": "device", "categories": ["mobile", "desktop"]},
        "referrer": {"request": "referrer", "categories": ["search", "ads"]},
    },
}
WEIGHTS = (0.25, 0.5, 1.0, -0.125, 0.0625)


def logistic(
    width: int = 5, *, shape: Sequence[int | None] | None = None, keep_column: bool = False
) -> onnx.ModelProto:
    """A logistic regression on the features, NaN taken for 0: `features` float32 [n, F] -> `propensity` float32 [n]."""
    weights = np.array([WEIGHTS[place % 5] for place in range(width)], np.float32).reshape(width, 1)
    nodes = [
        helper.make_node("IsNaN", ["features"], ["missing"]),
        helper.make_node("Where", ["missing", "zero", "features"], ["filled"]),
        helper.make_node("MatMul", ["filled", "weights"], ["product"]),
        helper.make_node("Add", ["product", "intercept"], ["margin"]),
        helper.make_node("Sigmoid", ["margin"], ["propensity" if keep_column else "column"]),
    ]
    if not keep_column:
        nodes.append(helper.make_node("Reshape", ["column", "flat"], ["propensity"]))
    graph = helper.make_graph(
        nodes,
        "logistic",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, width] if shape is None else shape)],
        [helper.make_tensor_value_info("propensity", TensorProto.FLOAT, [None, 1] if keep_column else [None])],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.array([-1], np.float32), "intercept"),
            numpy_helper.from_array(np.zeros((), np.float32), "zero"),
            numpy_helper.from_array(np.array([-1], np.int64), "flat"),
        ],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def score(vector: list[float]) -> float:
    margin = sum(weight * value for weight, value in zip(WEIGHTS, vector, strict=True) if not math.isnan(value)) - 1
    return 1 / (1 + math.exp(-margin))


def golden() -> list[dict[str, Any]]:
    """Three visitors: nobody, one who only looked, one about whom everything is known; worked out by hand."""
    look = b"".join(events.pack(NOW_MS - age, 1, age, 0, 9.5) for age in range(4))
    cart = events.pack(NOW_MS - 1000, 2, 1, 0, math.nan)
    device = events.pack(NOW_MS, events.TRAIT_TEXT, events.hash32("device"), events.hash32("desktop"), math.nan)
    nan = math.nan
    cases: list[tuple[bytes, bytes, dict[str, Any], list[float]]] = [
        (b"", b"", {}, [0, 0, nan, nan, nan]),
        (look, b"", {"referrer": "ads"}, [4, 0, 0, nan, 1]),
        (look + cart, device, {"referrer": "elsewhere", "x": 1}, [4, 1, 0.25, 1, 2]),
    ]
    return [
        {
            "records": base64.b64encode(records).decode(),
            "traits": base64.b64encode(traits).decode(),
            "request": request,
            "now_ms": NOW_MS,
            "vector": [None if math.isnan(value) else value for value in vector],
            "score": score(vector),
        }
        for records, traits, request, vector in cases
    ]


def manifest(spec: FeatureSpec) -> dict[str, Any]:
    return {
        "model": spec.model,
        "version": "20240131-120000",
        "created_at": "2024-01-31T12:00:00Z",
        "spec": spec.model_dump(mode="json"),
        "spec_hash": spec.hash,
        "names": list(spec.names),
        "dtype": "float32",
        "segments": dict(zip(SEGMENTS, (0.9, 0.7, 0.5, 0.3, 0.1), strict=False)),
        "calibration": {"slope": 1.0, "intercept": -2.5e-05},
        "data": {"rows": 1000, "fingerprint": "0f" * 32},
        "metrics": {"test": {"auc": 0.83, "brier": 4.5e-05}},
        "libraries": {"onnx": onnx.__version__},
    }


def reference() -> dict[str, Any]:
    bins = {"edges": [1.0, 2.0], "shares": [0.1, 0.4, 0.3, 0.2]}
    return {
        "features": dict.fromkeys(SPEC["features"], bins),
        "score": bins,
        "quantiles": [place / 100 for place in range(101)],
    }


def write(directory: Path, **changes: Any) -> Path:
    """A sealed bundle; `changes` replace a part before it is sealed."""
    parts: dict[str, Any] = {
        "model": logistic(),
        "golden": golden(),
        "reference": reference(),
        "manifest": manifest(parse(SPEC)),
    }
    parts |= changes
    directory.mkdir(exist_ok=True)
    (directory / "model.onnx").write_bytes(parts["model"].SerializeToString())
    (directory / "features.yaml").write_text("model: purchase_7d\n", encoding="utf-8")
    (directory / "model.txt").write_text("tree\nversion=v4\n", encoding="utf-8")
    for name in ("golden", "reference"):
        (directory / f"{name}.json").write_text(json.dumps(parts[name]), encoding="utf-8")
    bundle.seal(directory, parts["manifest"])
    return directory


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good bundle that nobody changes."""
    return write(tmp_path_factory.mktemp("sealed") / "20240131-120000")


@pytest.fixture
def copy(sealed: Path, tmp_path: Path) -> Path:
    """A copy of the good bundle, to be damaged."""
    return Path(shutil.copytree(sealed, tmp_path / "copy"))


def refusal(directory: Path, *words: str) -> str:
    with pytest.raises(InvalidBundle) as refused:
        bundle.load(directory)
    for word in words:
        assert word in str(refused.value), str(refused.value)
    return str(refused.value)


# --- A good bundle ---


def test_a_sealed_bundle_loads_with_its_name_version_and_spec(sealed: Path) -> None:
    loaded = bundle.load(sealed)
    assert (loaded.name, loaded.version) == ("purchase_7d", "20240131-120000")
    assert loaded.spec == parse(SPEC)
    assert set(loaded.manifest.files) == {"features.yaml", "golden.json", "model.onnx", "model.txt", "reference.json"}
    assert loaded.manifest.files["model.txt"] == hashlib.sha256(b"tree\nversion=v4\n").hexdigest()


def test_a_bundle_scores_what_the_formula_gives(sealed: Path) -> None:
    loaded = bundle.load(sealed)
    matrix = np.random.default_rng(3).normal(size=(500, 5)).astype(np.float32)
    matrix[::7, 2] = np.nan
    scores = loaded.predict(matrix)
    assert scores.dtype == np.float32
    assert scores.shape == (500,)
    np.testing.assert_allclose(scores, [score(row) for row in matrix.astype(float).tolist()], atol=1e-6)


def test_a_row_alone_scores_as_in_a_batch(sealed: Path) -> None:
    loaded = bundle.load(sealed)
    matrix = np.random.default_rng(4).normal(size=(64, 5)).astype(np.float32)
    alone = [loaded.predict(matrix[place : place + 1])[0] for place in range(64)]
    np.testing.assert_allclose(loaded.predict(matrix), alone, rtol=1e-6)
    assert loaded.predict(matrix[:0]).shape == (0,)


def test_the_vectors_of_the_golden_cases_are_what_the_kernel_gives(sealed: Path) -> None:
    loaded = bundle.load(sealed)
    cases = bundle.golden_cases(sealed)
    right = [[math.nan if value is None else value for value in case.vector] for case in cases]
    np.testing.assert_array_equal(bundle.golden_vectors(loaded.plan, cases), right)


def test_the_percentile_is_the_share_of_training_scores_below(sealed: Path) -> None:
    loaded = bundle.load(sealed)
    assert [loaded.percentile(value) for value in (-1, 0.0, 0.25, 0.5, 1.0, 2.0)] == [0, 0, 25, 50, 100, 100]
    between = loaded.percentile(0.255)
    assert 25 <= between <= 26
    assert loaded.percentile(0.001) < 1, "hardly anyone scored below"


def test_the_segment_follows_the_cut_offs_of_the_manifest(sealed: Path) -> None:
    loaded = bundle.load(sealed)
    found = [loaded.segment(value) for value in (1.0, 0.9, 0.89, 0.5, 0.3, 0.1, 0.0)]
    assert found == [SEGMENTS[place] for place in (0, 0, 1, 2, 3, 4, 5)]


def test_the_cut_offs_are_taken_by_name_whatever_their_order_in_the_file(tmp_path: Path) -> None:
    turned = manifest(parse(SPEC))
    turned["segments"] = dict(reversed(turned["segments"].items()))
    loaded = bundle.load(write(tmp_path / "turned", manifest=turned))
    assert [loaded.segment(value) for value in (0.95, 0.6, 0.05)] == ["champions", "potential_buyers", "low_priority"]


def test_an_infinite_feature_can_be_a_golden_case(tmp_path: Path) -> None:
    cases = golden()
    cart = base64.b64encode(events.pack(NOW_MS, 2, 1, 0, math.nan)).decode()
    cases.append({**cases[0], "records": cart, "vector": [0, 1, math.inf, None, None], "score": 1.0})
    assert bundle.load(write(tmp_path / "infinite", golden=cases)).name == "purchase_7d"


def test_whitespace_in_the_manifest_does_not_break_the_seal(copy: Path) -> None:
    text = json.dumps(json.loads((copy / "manifest.json").read_text()))
    (copy / "manifest.json").write_text(text, encoding="utf-8")
    assert bundle.load(copy).name == "purchase_7d"


def test_a_file_that_the_manifest_does_not_list_is_not_looked_at(copy: Path) -> None:
    (copy / "notes.txt").write_text("not part of the bundle", encoding="utf-8")
    assert bundle.load(copy).name == "purchase_7d"


@pytest.mark.parametrize("metrics", [{"auc": math.nan}, {"auc": math.inf}, {"auc": np.float32(0.5)}, {"at": Path()}])
def test_what_json_cannot_hold_is_not_sealed(tmp_path: Path, metrics: Mapping[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        write(tmp_path / "b", manifest={**manifest(parse(SPEC)), "metrics": metrics})
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_whole_numbers_as_keys_are_sealed_as_they_will_be_read(tmp_path: Path) -> None:
    by_decile = {place: 0.5 for place in (1, 2, 10, 9)}
    made = write(tmp_path / "b", manifest={**manifest(parse(SPEC)), "metrics": {"lift": by_decile}})
    assert bundle.load(made).manifest.metrics["lift"]["10"] == 0.5


# --- Damaged after it was sealed ---


def test_a_moment_of_training_is_read_in_utc_unless_it_says(tmp_path: Path) -> None:
    made = bundle.load(write(tmp_path / "b")).manifest
    for text, wanted in (
        ("2026-01-01", 1_767_225_600),
        ("2026-01-01T00:00:00Z", 1_767_225_600),
        ("2026-01-01T01:00:00+01:00", 1_767_225_600),
    ):
        created = made.model_copy(update={"created_at": text}).created
        assert created is not None
        assert created.timestamp() == wanted
    assert made.model_copy(update={"created_at": "long ago"}).created is None


def test_shares_of_segments_are_those_that_the_cut_offs_give_on_the_scores_of_the_reference(tmp_path: Path) -> None:
    loaded = bundle.load(write(tmp_path / "b"))
    scores = np.linspace(0, 1, 100_001)
    reference = loaded.reference.model_copy(update={"quantiles": tuple(np.quantile(scores, np.linspace(0, 1, 1001)))})
    found = replace(loaded, reference=reference).segment_shares
    given = Counter(loaded.segment(score) for score in scores.tolist())
    assert list(found) == list(SEGMENTS)
    for segment, share in found.items():
        assert share == pytest.approx(given[segment] / len(scores), abs=0.001)


NAMES = ("manifest.json", "model.onnx", "features.yaml", "reference.json", "golden.json", "model.txt")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    refusal(copy, name, "is missing")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(copy: Path, name: str, part: float) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: int(len(whole) * part)])
    refusal(copy, name)


@pytest.mark.parametrize("name", NAMES)
def test_an_edited_file_is_named(copy: Path, name: str) -> None:
    with (copy / name).open("ab") as file:
        file.write(b"{}")
    refusal(copy, name, "restore it")


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_in_the_place_of_a_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    (copy / name).mkdir()
    refusal(copy, name)


def test_what_is_no_bundle_at_all_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path, "manifest.json", "is missing")
    refusal(tmp_path / "nowhere", "manifest.json", "is missing")
    (tmp_path / "file").write_text("", encoding="utf-8")
    refusal(tmp_path / "file", "manifest.json")


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "[]", "3", '"manifest"', "{", "{}", "not json", "\ufeff{}", '{"format": 1}', "[" * 100_000),
        *("NaN", "Infinity", '{"a": 1' + "0" * 5000 + "}", '{"\\ud800": 1}'),
    ],
)
@pytest.mark.parametrize("name", ["manifest.json", "reference.json", "golden.json"])
def test_json_of_another_shape_is_named(sealed: Path, tmp_path: Path, name: str, text: str) -> None:
    made = Path(shutil.copytree(sealed, tmp_path / "b"))
    (made / name).write_text(text, encoding="utf-8")
    if name != "manifest.json":
        bundle.seal(made, manifest(parse(SPEC)))
    refusal(made, name)


@pytest.mark.parametrize("name", ["manifest.json", "reference.json", "golden.json"])
def test_bytes_that_are_no_text_are_named(sealed: Path, tmp_path: Path, name: str) -> None:
    made = Path(shutil.copytree(sealed, tmp_path / "b"))
    (made / name).write_bytes(b'{"\xff\xfe": 1}')
    if name != "manifest.json":
        bundle.seal(made, manifest(parse(SPEC)))
    refusal(made, name)


def edited(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as an editor would, leaving its seal."""
    path = directory / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["segments"].update(champions=0.1),
        lambda document: document["spec"]["features"]["views"].update(window="8d"),
        lambda document: document["files"].pop("model.txt"),
        lambda document: document["files"].update({"model.txt": "0" * 64}),
        lambda document: document["metrics"]["test"].update(auc=0.99),
        lambda document: document["metrics"]["test"].update(auc=math.nan),
        lambda document: document["metrics"]["test"].update(auc=math.inf),
        lambda document: document.update(version="20990101-000000"),
        lambda document: document.update(extra=1),
        lambda document: document.update(seal=""),
        lambda document: document.update(seal=None),
        lambda document: document.update(format=2),
        lambda document: document.pop("format"),
        lambda document: document.pop("libraries"),
    ],
)
def test_an_edited_manifest_is_refused(copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edited(copy, change)
    message = refusal(copy, "manifest.json")
    assert "restore it" in message or "train again" in message


def test_a_number_that_grew_beyond_all_numbers_is_refused(copy: Path) -> None:
    text = (copy / "manifest.json").read_text(encoding="utf-8")
    assert "4.5e-05" in text
    (copy / "manifest.json").write_text(text.replace("4.5e-05", "4.5e905"), encoding="utf-8")
    refusal(copy, "manifest.json")


def survives(sealed: Path, directory: Path, name: str) -> bool:
    """Whether the bundle still loads; it may only when what it says is unchanged. Else the refusal names the file."""
    try:
        loaded = bundle.load(directory)
    except InvalidBundle as refused:
        assert name in str(refused)
        return False
    assert name == "manifest.json"
    assert loaded.manifest == bundle.load(sealed).manifest
    return True


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_anywhere_is_refused(sealed: Path, copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    rng = random.Random(5)
    for place in rng.sample(range(len(whole)), min(150, len(whole))):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        (copy / name).write_bytes(damaged)
        assert not survives(sealed, copy, name) or whole[place : place + 1].isspace()


@settings(
    max_examples=250,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_random_edits_of_any_file_never_raise_anything_else(sealed: Path, copy: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*NAMES[1:], *NAMES[:1] * 5]))
    whole = (sealed / name).read_bytes()
    damaged = whole
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(damaged)))
        end = start + data.draw(st.integers(0, 12))
        tokens = st.sampled_from(
            [b"NaN", b"1e999", b"-", b"9", b"null", b'"', b"{}", b"[", b"\\ud800", b"\xff", b"true"]
        )
        damaged = damaged[:start] + data.draw(st.binary(max_size=6) | tokens) + damaged[end:]
    (copy / name).write_bytes(damaged)
    try:
        if damaged != whole:
            survives(sealed, copy, name)
    finally:
        (copy / name).write_bytes(whole)


# --- Sealed, but wrong in itself ---


def wrong(directory: Path, *words: str, **changes: Any) -> None:
    refusal(write(directory / "wrong", **changes), *words)


def test_a_spec_whose_hash_differs_is_refused(tmp_path: Path) -> None:
    other = parse({**SPEC, "limits": {"history": "30d"}})
    spec = parse(SPEC)
    wrong(
        tmp_path,
        "manifest.json",
        other.hash[:12],
        spec.hash[:12],
        "train again",
        manifest={**manifest(spec), "spec": other.model_dump(mode="json")},
    )


@pytest.mark.parametrize(
    ("part", "value", "word"),
    [
        ("spec", {}, "features"),
        ("spec", {**SPEC, "features": {"x": {"count": "nothing"}}}, "no event 'nothing'"),
        ("names", ["views"], "names"),
        ("names", [*SPEC["features"]][::-1], "names"),
        ("model", "another", "another"),
        ("segments", {}, "segments"),
        ("segments", {"champions": 0.5}, "segments"),
        ("segments", dict(zip(SEGMENTS, (0.1, 0.3, 0.5, 0.7, 0.9), strict=False)), "segments"),
    ],
)
def test_a_manifest_at_odds_with_itself_is_refused(tmp_path: Path, part: str, value: object, word: str) -> None:
    wrong(tmp_path, "manifest.json", word, manifest={**manifest(parse(SPEC)), part: value})


@pytest.mark.parametrize("name", ["model.onnx", "features.yaml", "reference.json", "golden.json"])
def test_a_bundle_sealed_without_a_needed_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    bundle.seal(copy, manifest(parse(SPEC)))
    refusal(copy, name, "again")


def renamed(part: str) -> onnx.ModelProto:
    made = logistic()
    for node in made.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = "renamed" if name == part else name
    for info in (*made.graph.input, *made.graph.output):
        info.name = "renamed" if info.name == part else info.name
    return made


@pytest.mark.parametrize(
    "model",
    [
        lambda: logistic(4),
        lambda: logistic(6),
        lambda: logistic(shape=[1, 5]),
        lambda: logistic(shape=[]),
        lambda: logistic(keep_column=True),
        lambda: renamed("features"),
        lambda: renamed("propensity"),
        onnx.ModelProto,
        lambda: helper.make_model(helper.make_graph([], "empty", [], [])),
    ],
)
def test_a_graph_that_does_not_fit_the_spec_is_refused(tmp_path: Path, model: Callable[[], onnx.ModelProto]) -> None:
    wrong(tmp_path, "model.onnx", "export it again", model=model())


def test_a_graph_that_fails_when_it_runs_is_refused(tmp_path: Path) -> None:
    made = logistic()
    numbers = next(tensor for tensor in made.graph.initializer if tensor.name == "flat")
    numbers.CopyFrom(numpy_helper.from_array(np.array([2], np.int64), "flat"))  # [n, 1] cannot become [2] for n = 3
    wrong(tmp_path, "export it again", model=made)


def test_a_sealed_file_that_is_no_graph_is_refused(copy: Path) -> None:
    whole = (copy / "model.onnx").read_bytes()
    for content in (b"", b"rubbish", whole[:-7], whole + b"\xff"):
        (copy / "model.onnx").write_bytes(content)
        bundle.seal(copy, manifest(parse(SPEC)))
        refusal(copy, "model.onnx", "export it again")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vector": [4, 1, 0.25, 1, 3]}, ["case 2", "'referrer'"]),
        ({"vector": [4, 1, 0.25, None, 2]}, ["case 2", "'device'"]),
        ({"vector": [4, 1, 0.2500005, 1, 2]}, ["case 2", "'rate'"]),
        ({"now_ms": NOW_MS - 1}, ["case 2", "'views'"]),
        ({"traits": ""}, ["case 2", "'device'"]),
        ({"request": {}}, ["case 2", "'referrer'"]),
        ({"score": 0.9}, ["case 2", "scores"]),
        ({"score": score([4, 1, 0.25, 1, 2]) + 2e-5}, ["case 2", "scores"]),
        ({"score": math.nan}, []),
        ({"vector": [4, 1, 0.25, 1]}, []),
        ({"vector": [4, 1, 0.25, 1, 2, 3]}, []),
        ({"vector": []}, []),
        ({"vector": None}, []),
        ({"records": "abc"}, []),
        ({"records": "\u00e9"}, []),
        ({"traits": 5}, []),
        ({"now_ms": 2**70}, []),
        ({"now_ms": 0.5}, []),
        ({"request": []}, []),
        ({"unknown": 1}, []),
    ],
)
def test_a_golden_case_that_does_not_come_out_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    cases = golden()
    cases[2] |= changes
    wrong(tmp_path, "golden.json", *words, golden=cases)


def test_golden_cases_of_different_widths_are_refused(tmp_path: Path) -> None:
    cases = golden()
    cases[0]["vector"] = [0, 0]
    wrong(tmp_path, "golden.json", golden=cases)


@pytest.mark.parametrize("cases", [[], {}, [[]], [None], {"a": 1}, 5, "text", None])
def test_golden_cases_of_another_shape_are_refused(tmp_path: Path, cases: object) -> None:
    wrong(tmp_path, "golden.json", golden=cases)


@pytest.mark.parametrize(
    "made",
    [
        {**reference(), "unknown": 1},
        {**reference(), "score": {"edges": [], "shares": [], "edgse": []}},
        {**reference(), "features": {"views": {"edges": [], "shares": [], "edgse": []}}},
        {**reference(), "features": {"views": {"edges": []}}},
        {**reference(), "features": []},
        {**reference(), "quantiles": ["a"]},
        {**reference(), "quantiles": []},
        {**reference(), "quantiles": [0.5, 0.1]},
        {**reference(), "quantiles": [0.0, math.nan]},
        {**reference(), "score": {"edges": [1.0], "shares": [0.5, 0.5]}},
        {**reference(), "score": {"edges": [2.0, 1.0], "shares": [0.25, 0.25, 0.25, 0.25]}},
    ],
)
def test_a_reference_that_does_not_fit_the_spec_is_refused(tmp_path: Path, made: dict[str, Any]) -> None:
    wrong(tmp_path, "reference.json", reference=made)


def test_nothing_but_the_listed_refusals_comes_out_of_a_sealed_random_graph(copy: Path) -> None:
    whole = (copy / "model.onnx").read_bytes()
    rng = random.Random(6)
    loaded: list[Bundle] = []
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (copy / "model.onnx").write_bytes(damaged)
        bundle.seal(copy, manifest(parse(SPEC)))
        try:
            loaded.append(bundle.load(copy))
        except InvalidBundle as refused:
            assert "export it again" in str(refused) or "golden.json" in str(refused)
    nobody = features.matrix(
        features.compile(parse(SPEC)), np.empty(0, events.RECORD), np.array([0, 0]), np.array([NOW_MS])
    )
    assert all(abs(made.predict(nobody)[0] - score(nobody[0].tolist())) <= 1e-5 for made in loaded)
