"""Holds `training.export` to one promise: what ONNX Runtime answers is what LightGBM answers."""

from __future__ import annotations

import errno
import json
import os
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
from hypothesis import given
from hypothesis import strategies as st

from training import export, parity

Rows = npt.NDArray[np.float32]
Case = tuple[lightgbm.Booster, Rows]
FEATURES = 8


def rows(seed: int = 0, count: int = 4_000, missing: float = 0.0, zeros: float = 0.0) -> Rows:
    rng = np.random.default_rng(seed)
    table = rng.lognormal(size=(count, FEATURES)) * rng.choice([-1, 1], size=(count, FEATURES))
    table[rng.random(table.shape) < zeros] = 0
    table[rng.random(table.shape) < missing] = np.nan
    return np.asarray(table, np.float32)


def labels(table: npt.NDArray[Any], seed: int = 1) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    filled = np.nan_to_num(table.astype(np.float64))
    margin = (filled / (filled.std(axis=0) + 1e-12)) @ rng.normal(size=table.shape[1])
    return np.asarray(margin + rng.normal(size=len(table)) > np.median(margin), np.float64)


def train(
    table: npt.NDArray[Any], rounds: int = 20, label: npt.NDArray[Any] | None = None, **params: Any
) -> lightgbm.Booster:
    settings = {"objective": "binary", "verbose": -1, "num_threads": 1, "seed": 0, **params}
    data = lightgbm.Dataset(table, labels(table) if label is None else label)
    return lightgbm.train(settings, data, rounds)


def edited(booster: lightgbm.Booster, **lines: Callable[[str], str]) -> lightgbm.Booster:
    """The booster with lines of every tree's text changed, its tree sizes counted anew."""
    text = booster.model_to_string()
    for name, change in lines.items():
        parts = re.split(rf"(?m)^({name}=.*)$", text)
        parts[1::2] = [f"{name}={change(line.partition('=')[2])}" for line in parts[1::2]]
        text = "".join(parts)
    blocks = re.split(r"(?m)^(?=Tree=\d+$)", text.partition("end of trees")[0])[1:]
    sizes = " ".join(str(len(block)) for block in blocks)
    return lightgbm.Booster(model_str=re.sub(r"(?m)(?<=^tree_sizes=).*$", sizes, text))


def plain() -> Case:
    table = rows(missing=0.05)
    return train(table, 60), table


def deep() -> Case:
    table = rows(count=8_000)
    return train(table, 6, num_leaves=300, min_data_in_leaf=1, min_sum_hessian_in_leaf=1e-9), table


def nan_heavy() -> Case:
    table = rows(missing=0.7)
    return train(table, 30), table


def between_float32_neighbours() -> Case:
    """Features on consecutive float32 values: every threshold lies half-way between two of them."""
    steps = np.random.default_rng(3).integers(0, 60, (4_000, FEATURES)).astype(np.int32)
    table = (np.float32(1.5).view(np.int32) + steps).view(np.float32)
    return train(table, 30, min_data_in_bin=1), table


def thousand_trees() -> Case:
    table = rows(missing=0.05)
    return train(table, 1_000, num_leaves=6, learning_rate=0.02), table


def zeros_and_negatives() -> Case:
    table = rows(missing=0.05, zeros=0.6)
    return train(table, 30), table


def single_leaf() -> Case:
    table = rows()
    return train(table, 5, min_data_in_leaf=100_000), table


def some_single_leaves() -> Case:
    table = rows()
    return train(table, 40, min_gain_to_split=30.0, boosting="dart", drop_rate=0.5), table


def never_missing() -> Case:
    table = rows(zeros=0.3)
    return train(table, use_missing=False), rows(seed=5, missing=0.3)


def sigmoid_parameter() -> Case:
    table = rows()
    return train(table, sigmoid=0.5, is_unbalance=True), table


def dart() -> Case:
    table = rows(missing=0.05)
    return train(table, boosting="dart", drop_rate=0.5), table


def random_forest() -> Case:
    table = rows(missing=0.05)
    return train(table, boosting="rf", bagging_fraction=0.7, bagging_freq=1, sigmoid=0.7), table


def cross_entropy() -> Case:
    table = rows(missing=0.05)
    shares = np.random.default_rng(2).random(len(table))
    return train(table, objective="cross_entropy", label=shares), table


def stopped_early() -> Case:
    table = rows()
    noise = np.random.default_rng(4).integers(0, 2, len(table)).astype(np.float64)
    data = lightgbm.Dataset(table[:2_000], noise[:2_000])
    later = data.create_valid(table[2_000:], noise[2_000:])
    params = {"objective": "binary", "verbose": -1, "num_threads": 1}
    stop = lightgbm.early_stopping(5, verbose=False)
    booster = lightgbm.train(params, data, 50, valid_sets=[later], callbacks=[stop], keep_training_booster=True)
    assert 0 < booster.best_iteration < booster.num_trees()
    return booster, table


def missing_against_present() -> Case:
    """Only whether a value is there matters: the threshold is infinite, NaN on its other side."""
    table = rows(missing=0.5)
    booster = train(table, label=np.isnan(table[:, 0]).astype(np.float64), min_data_in_leaf=5)
    assert re.search(r"(?m)^threshold=.*\binf\b", booster.model_to_string())
    return booster, table


def extreme_thresholds() -> Case:
    """Beyond float32, at its ends, subnormal, around zero; as LightGBM's own text can hold them."""
    zero = export.ZERO
    largest = float(np.finfo(np.float32).max)
    beside_zero = [0.0, zero, np.nextafter(zero, 1), np.nextafter(zero, 0), 1e-36, 2e-35, 1e-40, 1e-46]
    extremes = [value for one in beside_zero for value in (one, -one)]
    extremes += [1e300, -1e300, np.inf, largest, -largest, 3.4028235677973366e38, -3.5e38]
    extremes += [1 + 2**-25, 1 + 2**-24, 1 + 3 * 2**-24, -1 - 2**-24, float(np.finfo(np.float32).tiny)]
    order = np.random.default_rng(6)

    def thresholds(line: str) -> str:
        return " ".join(repr(float(value)) for value in order.choice(extremes, len(line.split())))

    def decisions(line: str) -> str:
        return " ".join(str(value) for value in order.choice([0, 2, 8, 10], len(line.split())))

    booster = train(rows(), 60, num_leaves=5)
    return edited(booster, threshold=thresholds, decision_type=decisions), rows(missing=0.1)


CASES = [plain, deep, nan_heavy, between_float32_neighbours, thousand_trees, zeros_and_negatives, single_leaf,
         some_single_leaves, never_missing, sigmoid_parameter, dart, random_forest, cross_entropy, stopped_early,
         missing_against_present, extreme_thresholds]  # fmt: skip


CALIBRATED = export.Calibration(0.8, -1.5)
PAIRS = [(case, None) for case in CASES if case is not thousand_trees] + [(case, CALIBRATED) for case in CASES]


@pytest.mark.parametrize(("case", "calibration"), PAIRS)
def test_every_kind_of_booster_is_exported_exactly(
    case: Callable[[], Case], calibration: export.Calibration | None
) -> None:
    booster, table = case()
    model = export.to_onnx(booster, feature_names=booster.feature_name(), calibration=calibration)
    onnx.checker.check_model(model, full_check=True)
    report = parity.check(booster, model.SerializeToString(), calibration, rows=table)
    assert report.max_difference <= 5e-8
    assert report.rows >= len(table)
    assert report.leaves == report.rows * report.trees
    if calibration is None:
        session = onnxruntime.InferenceSession(model.SerializeToString())
        served = session.run(["propensity"], {"features": table})[0]
        assert served.dtype == np.float32
        np.testing.assert_array_max_ulp(served, np.asarray(booster.predict(table), np.float32), 1)


def test_a_row_count_of_zero_gives_no_scores() -> None:
    booster, table = dart()
    model = export.to_onnx(booster, feature_names=booster.feature_name()).SerializeToString()
    assert onnxruntime.InferenceSession(model).run(None, {"features": table[:0]})[0].shape == (0,)


def test_margins_far_beyond_the_usual_stay_exact() -> None:
    booster, table = plain()
    for slope in (1e-3, 50.0, 1e4):
        calibration = export.Calibration(slope, 0.5)
        model = export.to_onnx(booster, feature_names=booster.feature_name(), calibration=calibration)
        assert parity.check(booster, model.SerializeToString(), calibration, rows=table).max_difference <= 5e-8


def test_low_propensities_keep_their_relative_precision() -> None:
    booster, table = plain()
    calibration = export.Calibration(1.0, -15.0)
    model = export.to_onnx(booster, feature_names=booster.feature_name(), calibration=calibration)
    served = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"features": table})[0]
    expected = 1 / (1 + np.exp(15.0 - np.asarray(booster.predict(table, raw_score=True))))
    assert expected.max() < 1e-4
    np.testing.assert_allclose(served, expected, rtol=1e-7)


@given(
    st.floats(allow_nan=False) | st.floats(-3e-35, 3e-35) | st.floats(-1e-44, 1e-44),
    st.floats(width=32, allow_nan=False) | st.floats(-(2.0**-115), 2.0**-115, width=32),
)
def test_a_float32_threshold_divides_float32_values_as_lightgbm_does(threshold: float, value: float) -> None:
    rounded = float(export.float32_thresholds(np.array([threshold]))[0])
    with np.errstate(over="ignore"):
        neighbours = np.nextafter(np.float32(rounded), np.array([-np.inf, 0, np.inf], np.float32))
    for x in (value, rounded, *neighbours.astype(float)):
        read = 0.0 if abs(x) <= export.ZERO else x
        assert (x <= rounded) == (read <= threshold)


def test_a_split_beside_zero_keeps_1e_35_where_lightgbm_reads_it_as_zero() -> None:
    booster, _ = zeros_and_negatives()
    assert "-1.0000000180025095e-35" in booster.model_to_string()
    edge = np.array([-1, 1], np.float32)[:, None] * np.full((1, FEATURES), 1e-35, np.float32)
    session = onnxruntime.InferenceSession(
        export.to_onnx(booster, feature_names=booster.feature_name()).SerializeToString()
    )
    scores = session.run(None, {"features": edge})[0]
    assert scores[0] == scores[1] == session.run(None, {"features": np.zeros((1, FEATURES), np.float32)})[0][0]


def test_no_root_has_a_split_child_and_a_leaf_child_of_the_same_number() -> None:
    """ONNX Runtime up to 1.23 answers the wrong leaf for such a root."""
    right_heavy = edited(train(rows(), 3, num_leaves=3), left_child=lambda _: "-2 -1", right_child=lambda _: "1 -3")
    shapes = [plain()[0], some_single_leaves()[0], thousand_trees()[0]]
    for booster in [*shapes, right_heavy]:
        graph = export.to_onnx(booster, feature_names=booster.feature_name()).graph
        attribute = {one.name: one.ints for one in graph.node[1].attribute}
        for root in attribute["tree_roots"]:
            sides = [attribute[f"nodes_{side}leafs"][root] for side in ("true", "false")]
            children = [attribute[f"nodes_{side}nodeids"][root] for side in ("true", "false")]
            assert sides[0] == sides[1] or children[0] != children[1]


def test_the_order_of_columns_is_kept_in_the_graph() -> None:
    model = export.to_onnx(dart()[0], feature_names=list("abcdefgh"))
    assert json.loads(model.metadata_props[0].value) == list("abcdefgh")
    assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_value == FEATURES


def test_a_file_is_exported_with_the_numbers_of_the_gate(tmp_path: Path) -> None:
    booster, table = sigmoid_parameter()
    booster.save_model(tmp_path / "model.txt")
    told: list[float] = []
    report = export.export_file(tmp_path / "model.txt", tmp_path / "new" / "out", progress=told.append)
    assert sorted(file.name for file in (tmp_path / "new" / "out").iterdir()) == ["model.onnx", "parity.json"]
    assert json.loads((tmp_path / "new" / "out" / "parity.json").read_text())["rows"] == report.rows
    session = onnxruntime.InferenceSession(tmp_path / "new" / "out" / "model.onnx")
    served = session.run(None, {"features": table})[0]
    np.testing.assert_allclose(served, np.asarray(booster.predict(table)), atol=5e-8)
    assert told == sorted(told) and told[-1] == 1.0


def multiclass() -> lightgbm.Booster:
    return train(rows(), 2, objective="multiclass", num_class=3, label=np.arange(4_000) % 3)


def regression() -> lightgbm.Booster:
    return train(rows(), 2, objective="regression")


def cross_entropy_lambda() -> lightgbm.Booster:
    return train(rows(), 2, objective="cross_entropy_lambda")


def custom_loss() -> lightgbm.Booster:
    def loss(score: npt.NDArray[Any], data: lightgbm.Dataset) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return score - data.get_label(), np.ones_like(score)

    return train(rows(), 2, objective=loss)


def linear_trees() -> lightgbm.Booster:
    return train(rows(), 2, linear_tree=True)


def categorical() -> lightgbm.Booster:
    table = rows()
    table[:, 2] = np.arange(len(table)) % 9
    data = lightgbm.Dataset(table, np.isin(table[:, 2], [1, 4, 7]), categorical_feature=[2])
    return lightgbm.train({"objective": "binary", "verbose": -1, "num_threads": 1}, data, 5)


def zero_as_missing() -> lightgbm.Booster:
    return train(rows(zeros=0.5), 2, zero_as_missing=True)


def untrained() -> lightgbm.Booster:
    return lightgbm.Booster({"objective": "binary", "verbose": -1}, lightgbm.Dataset(rows(), labels(rows())))


@pytest.mark.parametrize(
    ("refused", "remedy"),
    [
        (multiclass, "objective multiclass .* train with objective=binary"),
        (regression, "objective regression .* train with objective=binary"),
        (cross_entropy_lambda, "objective cross_entropy_lambda .* train with objective=binary"),
        (custom_loss, "custom loss.* train it with objective=binary"),
        (linear_trees, "train with linear_tree=false"),
        (categorical, "tree 0, split 0: feature Column_2 is a native categorical; .*feature spec"),
        (zero_as_missing, r"tree 0, split \d+: feature Column_\d reads 0 as missing; .*zero_as_missing=false"),
        (untrained, "no trees; train it for at least one round"),
    ],
)
def test_what_onnx_cannot_carry_exactly_is_refused_with_a_remedy(
    refused: Callable[[], lightgbm.Booster], remedy: str, tmp_path: Path
) -> None:
    booster = refused()
    with pytest.raises(export.ExportError, match=remedy):
        export.write(booster, tmp_path / "out", feature_names=booster.feature_name())
    assert not (tmp_path / "out").exists()


def test_names_that_do_not_fit_the_columns_are_refused() -> None:
    data = lightgbm.Dataset(rows(), labels(rows()), feature_name=["views 1h", *"bcdefgh"])
    booster = lightgbm.train({"objective": "binary", "verbose": -1, "num_threads": 1}, data, 2)
    export.to_onnx(booster, feature_names=["views 1h", *"bcdefgh"])
    with pytest.raises(export.ExportError, match="7 feature names for a model of 8 features"):
        export.to_onnx(booster, feature_names=list("abcdefg"))
    with pytest.raises(export.ExportError, match="column 1 of the model is b, not c; keep the order"):
        export.to_onnx(booster, feature_names=["views 1h", *"cbdefgh"])


@pytest.mark.parametrize(("slope", "intercept"), [(0.0, 0.0), (-1.0, 0.0), (np.nan, 0.0), (1.0, np.inf)])
def test_a_calibration_that_would_not_keep_the_order_of_scores_is_refused(slope: float, intercept: float) -> None:
    with pytest.raises(export.ExportError, match="slope > 0"):
        export.Calibration(slope, intercept)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda text: b"\x80\x05\x95" + text, "not a LightGBM text model; write one with booster.save_model"),
        (lambda text: b"visitor_id,label\n7,1\n", "not a whole LightGBM text model"),
        (lambda text: b"", "not a whole LightGBM text model"),
        (lambda text: text[: len(text) // 3], "not a whole LightGBM text model"),
        (lambda text: text.replace(b"threshold=", b"threshold=1"), "edited or cut off"),
        (lambda text: re.sub(rb"left_child=\S+", b"left_child=" + b"9", text), "edited or cut off|malformed"),
        (lambda text: re.sub(rb"(?m)leaf_value=\S+", lambda f: b"leaf_value=" + b"x" * (len(f[0]) - 11), text),
         "tree 0 of the LightGBM model is malformed"),
        (lambda text: text.replace(b"split_feature=", b"split_feature "), "tree 0 .* malformed: 'split_feature'"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_whole_model_is_refused_in_one_line(
    spoil: Callable[[bytes], bytes], complaint: str, tmp_path: Path
) -> None:
    booster, _ = dart()
    (tmp_path / "model.txt").write_bytes(spoil(booster.model_to_string().encode()))
    with pytest.raises(export.ExportError, match=complaint) as refusal:
        export.export_file(tmp_path / "model.txt", tmp_path / "out")
    assert "\n" not in str(refusal.value) and "model.txt" in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_an_unwritable_directory_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(export.ExportError, match=r"cannot read .*absent\.txt: No such file"):
        export.export_file(tmp_path / "absent.txt", tmp_path / "out")
    dart()[0].save_model(tmp_path / "model.txt")
    with pytest.raises(export.ExportError, match=r"cannot write .*model\.txt"):
        export.export_file(tmp_path / "model.txt", tmp_path / "model.txt")


def test_a_disk_that_is_full_is_told_with_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of a write it has no name of a file

    monkeypatch.setattr(export, "_replace", full)
    dart()[0].save_model(tmp_path / "model.txt")
    with pytest.raises(export.ExportError, match=r"cannot write .*/out: No space left on device"):
        export.export_file(tmp_path / "model.txt", tmp_path / "out")
