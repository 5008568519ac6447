"""Holds `training.parity` to its purpose: a graph that differs anywhere is caught, and never written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from training import export, parity

FEATURES = 6
Floats = npt.NDArray[np.float64]
Change = Callable[["Graph", int], None]


class Graph:
    """A model whose ensemble can be spoilt, one array at a time."""

    def __init__(self, booster: lightgbm.Booster, calibration: export.Calibration | None = None) -> None:
        self.model = export.to_onnx(booster, feature_names=booster.feature_name(), calibration=calibration)
        self.ensemble = self.model.graph.node[1]

    def attribute(self, name: str) -> Any:
        return next(one for one in self.ensemble.attribute if one.name == name)

    def ints(self, name: str) -> Any:
        return self.attribute(name).ints

    def change(self, name: str, place: int, new: Callable[[np.float64], float]) -> None:
        tensor = self.attribute(name).t
        values = numpy_helper.to_array(tensor).copy()
        values[place] = new(values[place])
        tensor.CopyFrom(numpy_helper.from_array(values))

    def bytes(self) -> bytes:
        return bytes(self.model.SerializeToString())


def train(rounds: int = 8, leaves: int = 7, missing: float = 0.1, seed: int = 0) -> lightgbm.Booster:
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(2_000, FEATURES)).astype(np.float32)
    label = (np.abs(table[:, 0]) + table[:, 1] * table[:, 2] + rng.normal(size=len(table)) > 1).astype(float)
    table[rng.random(table.shape) < missing] = np.nan
    params = {"objective": "binary", "verbose": -1, "num_threads": 1, "num_leaves": leaves}
    return lightgbm.train(params, lightgbm.Dataset(table, label), rounds)


@pytest.fixture(scope="module")
def booster() -> lightgbm.Booster:
    return train()


def test_a_right_graph_passes_with_all_splits_probed(booster: lightgbm.Booster) -> None:
    report = parity.check(booster, Graph(booster).bytes())
    assert (report.trees, report.splits, report.unreachable) == (8, 48, ())
    assert report.probes >= 48 * 5
    assert report.leaves == report.rows * 8
    assert 0 < report.max_difference < 5e-8


def nudged_up(graph: Graph, split: int) -> None:
    graph.change("nodes_splits", split, lambda x: np.nextafter(np.float32(x), np.float32(np.inf)))


def nudged_down(graph: Graph, split: int) -> None:
    graph.change("nodes_splits", split, lambda x: np.nextafter(np.float32(x), np.float32(-np.inf)))


def other_sign(graph: Graph, split: int) -> None:
    graph.change("nodes_splits", split, lambda x: -x)


def other_feature(graph: Graph, split: int) -> None:
    features = graph.ints("nodes_featureids")
    features[split] = (features[split] + 1) % FEATURES


@pytest.mark.parametrize("spoil", [nudged_up, nudged_down, other_sign, other_feature])
def test_one_wrong_split_is_found_and_named_wherever_it_is(booster: lightgbm.Booster, spoil: Change) -> None:
    for place in range(48):
        graph = Graph(booster)
        spoil(graph, place)
        with pytest.raises(parity.ParityError) as failure:
            parity.check(booster, graph.bytes())
        assert (failure.value.tree, failure.value.split) == divmod(place, 6)
        assert f"tree {place // 6}, split {place % 6} (" in str(failure.value)
        assert_differs(booster, graph, failure.value)


def assert_differs(booster: lightgbm.Booster, graph: Graph, failure: parity.ParityError) -> None:
    """The row that the error carries shows the fault by itself."""
    row = np.array([failure.row], np.float32)
    served = onnxruntime.InferenceSession(graph.bytes()).run(None, {"features": row})[0]
    assert abs(served[0] - np.asarray(booster.predict(row))[0]) > 1e-7


def test_a_flipped_default_direction_is_found_at_every_root(booster: lightgbm.Booster) -> None:
    for place in range(0, 48, 6):
        graph = Graph(booster)
        directions = graph.ints("nodes_missing_value_tracks_true")
        directions[place] = 1 - directions[place]
        with pytest.raises(parity.ParityError, match="=nan") as failure:
            parity.check(booster, graph.bytes())
        assert (failure.value.tree, failure.value.split) == (place // 6, 0)
        assert_differs(booster, graph, failure.value)


def test_thresholds_rounded_to_nearest_are_found_and_nothing_is_written(
    booster: lightgbm.Booster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(export, "float32_thresholds", lambda t: t.astype(np.float32).astype(np.float64))
    with pytest.raises(parity.ParityError, match=r"^tree \d+, split \d+ \(Column_\d <= .*\): LightGBM goes to leaf"):
        export.write(booster, tmp_path / "out", feature_names=booster.feature_name())
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_survives_a_failed_one(
    booster: lightgbm.Booster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    export.write(booster, tmp_path, feature_names=booster.feature_name())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(export, "float32_thresholds", lambda t: t.astype(np.float32).astype(np.float64))
    with pytest.raises(parity.ParityError):
        export.write(booster, tmp_path, feature_names=booster.feature_name())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_plain_rounding_down_is_found_out_at_1e_35(monkeypatch: pytest.MonkeyPatch) -> None:
    def round_down(threshold: Floats) -> Floats:
        nearest = threshold.astype(np.float32)
        lower = np.nextafter(nearest, np.float32(-np.inf))
        return np.where(nearest > threshold, lower, nearest).astype(np.float64)

    table = np.random.default_rng(0).integers(-1, 2, (1_000, 2)).astype(np.float32)
    params = {"objective": "binary", "verbose": -1, "num_threads": 1, "num_leaves": 3}
    booster = lightgbm.train(params, lightgbm.Dataset(table, (table[:, 0] < 0).astype(float)), 1)
    monkeypatch.setattr(export, "float32_thresholds", round_down)
    with pytest.raises(parity.ParityError, match="Column_0=-1e-35"):
        parity.check(booster, Graph(booster).bytes())


def test_an_infinite_threshold_that_was_made_finite_is_found_out_at_infinity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = np.random.default_rng(0).normal(size=(1_000, 2)).astype(np.float32)
    table[::2, 0] = np.nan
    params = {"objective": "binary", "verbose": -1, "num_threads": 1, "num_leaves": 2}
    booster = lightgbm.train(params, lightgbm.Dataset(table, np.isnan(table[:, 0]).astype(float)), 1)
    monkeypatch.setattr(export, "float32_thresholds", lambda t: np.minimum(t, np.finfo(np.float32).max))
    with pytest.raises(parity.ParityError, match=r"tree 0, split 0 \(Column_0 <= inf\).* Column_0=inf;"):
        parity.check(booster, Graph(booster).bytes())


def test_a_wrong_leaf_is_found_by_the_score_and_its_row_is_named(booster: lightgbm.Booster) -> None:
    graph = Graph(booster)
    graph.change("leaf_weights", 20, lambda weight: weight + 1e-4)
    with pytest.raises(parity.ParityError, match="scores .* in ONNX Runtime and .* in LightGBM") as failure:
        parity.check(booster, graph.bytes())
    assert failure.value.row is not None and len(failure.value.row) == FEATURES
    assert_differs(booster, graph, failure.value)


def test_a_calibration_that_is_not_in_the_graph_is_found(booster: lightgbm.Booster) -> None:
    asked = export.Calibration(1.0, 1e-4)
    with pytest.raises(parity.ParityError, match="scores"):
        parity.check(booster, Graph(booster).bytes(), asked)
    parity.check(booster, Graph(booster, asked).bytes(), asked)


def crossed_branches(graph: Graph) -> None:
    """Two leaves of the first tree change places."""
    weights = numpy_helper.to_array(graph.attribute("leaf_weights").t)
    graph.change("leaf_weights", 0, lambda _: weights[1])
    graph.change("leaf_weights", 1, lambda _: weights[0])


def another_shape(graph: Graph) -> None:
    for sort in ("nodeids", "leafs"):
        true, false = graph.ints(f"nodes_true{sort}"), graph.ints(f"nodes_false{sort}")
        true[0], false[0] = false[0], true[0]


def a_tree_less(graph: Graph) -> None:
    del graph.ints("tree_roots")[-1]


def a_leaf_twice(graph: Graph) -> None:
    place = list(graph.ints("nodes_trueleafs")).index(1)
    leaves = [at for at, leaf in enumerate(graph.ints("nodes_falseleafs")) if leaf]
    graph.ints("nodes_truenodeids")[place] = graph.ints("nodes_falsenodeids")[leaves[-1]]


def less_than(graph: Graph) -> None:
    graph.change("nodes_modes", 0, lambda _: 1)


def no_squeeze(graph: Graph) -> None:
    del graph.model.graph.node[-1]
    graph.model.graph.node[-1].output[0] = "propensity"


def no_ensemble(graph: Graph) -> None:
    del graph.model.graph.node[1]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (crossed_branches, "scores"),
        (another_shape, "tree 0, split 0: the graph has another shape|goes to leaf"),
        (a_tree_less, "the graph has 7 trees, LightGBM 8"),
        (a_leaf_twice, "one leaf in two places"),
        (less_than, "compares otherwise than by <="),
        (no_squeeze, r"the graph answers float32\[1, 1\]"),
        (no_ensemble, "0 TreeEnsemble nodes"),
    ],
)
def test_a_graph_of_another_form_is_found(
    booster: lightgbm.Booster, spoil: Callable[[Graph], None], complaint: str
) -> None:
    graph = Graph(booster)
    spoil(graph)
    with pytest.raises(parity.ParityError, match=complaint) as failure:
        parity.check(booster, graph.bytes())
    assert "\n" not in str(failure.value)


def test_a_runtime_that_routes_otherwise_is_found(booster: lightgbm.Booster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is right; the runtime, given flipped NaN directions behind the gate's back, is not."""
    build = parity._session

    def faulty(model: bytes) -> onnxruntime.InferenceSession:
        graph = onnx.load_model_from_string(model)
        node = next(node for node in graph.graph.node if node.op_type == "TreeEnsemble")
        tracks = next(one for one in node.attribute if one.name == "nodes_missing_value_tracks_true").ints
        tracks[6] = 1 - tracks[6]
        return build(graph.SerializeToString())

    monkeypatch.setattr(parity, "_session", faulty)
    with pytest.raises(parity.ParityError, match="tree 1, split 0 .*: LightGBM .*, ONNX Runtime to leaf"):
        parity.check(booster, Graph(booster).bytes())


def test_rows_of_the_caller_are_compared_too(booster: lightgbm.Booster) -> None:
    some = np.random.default_rng(0).normal(size=(500, FEATURES)).astype(np.float32)
    plain = parity.check(booster, Graph(booster).bytes())
    assert parity.check(booster, Graph(booster).bytes(), rows=some).rows == plain.rows + 500
    with pytest.raises(parity.ParityError, match=r"rows of shape \(500, 5\) .* give \[n, 6\]"):
        parity.check(booster, Graph(booster).bytes(), rows=some[:, :5])


def test_small_blocks_probe_the_same_splits_as_large_ones(
    booster: lightgbm.Booster, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = parity.check(booster, Graph(booster).bytes())
    monkeypatch.setattr(parity, "BOX_CELLS", 1_000)
    monkeypatch.setattr(parity, "LEAF_CELLS", 1_000)
    blocks = parity.check(booster, Graph(booster).bytes())
    assert (blocks.splits, blocks.probes, blocks.unreachable) == (whole.splits, whole.probes, whole.unreachable)
    graph = Graph(booster)
    nudged_up(graph, 47)
    with pytest.raises(parity.ParityError, match="tree 7, split 5"):
        parity.check(booster, graph.bytes())


def test_a_split_that_no_float32_row_reaches_is_reported() -> None:
    """x <= 1 + 2^-25 and then x > 1 + 2^-26: doubles lie between, but no float32 does."""
    lines = {
        "split_feature": "0 0 1",
        "threshold": f"{1 + 2**-25!r} {1 + 2**-26!r} 0.5",
        "decision_type": "2 2 2",
        "left_child": "1 -1 -2",
        "right_child": "-4 2 -3",
    }
    text = train(rounds=1, leaves=4, missing=0).model_to_string()
    for name, line in lines.items():
        text = re.sub(rf"(?m)(?<=^{name}=).*$", line, text)
    size = len(text.partition("end of trees")[0][text.index("Tree=0") :])
    booster = lightgbm.Booster(model_str=re.sub(r"(?m)(?<=^tree_sizes=).*$", str(size), text))
    report = parity.check(booster, Graph(booster).bytes())
    assert report.unreachable == ((0, 2),)
