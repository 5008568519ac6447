"""Owns the step from a LightGBM booster to an ONNX graph that scores exactly what LightGBM scores.

`to_onnx` builds the graph, `write` and `export_file` put it on disk once `training.parity` has passed it.
Why the graph looks as it does, with measurements: docs/adr/0003-exact-export.md.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.core.errors import PropensityError
from training import parity

INPUT, OUTPUT = "features", "propensity"
OPSET, ML_OPSET, IR_VERSION = (
    18,
    5,
    9,
)  # the oldest that have TreeEnsemble: any runtime that can run it will load it
ZERO = float(np.float32(1e-35))  # LightGBM reads every |x| <= ZERO as 0 when it predicts
BRANCH_LEQ = 0  # x <= threshold, in ai.onnx.ml
CATEGORICAL, DEFAULT_LEFT = 1, 2  # bits of decision_type; the two bits above them are how the split reads NaN
MISSING_IS_ZERO, MISSING_IS_NAN = 1, 2

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]


class ExportError(PropensityError):
    """A model that cannot be exported; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Platt scaling: probability = 1 / (1 + exp(-(slope * margin + intercept))), slope > 0.

    The margin is what `Booster.predict(raw_score=True)` returns (for boosting=rf: the sum, not the mean).
    """

    slope: float
    intercept: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.slope) and self.slope > 0 and math.isfinite(self.intercept)):
            raise ExportError(f"{self} must be finite with slope > 0; fit it on held-out data with both classes")


@dataclass(frozen=True, slots=True)
class Tree:
    """A LightGBM tree of m splits and m + 1 leaves; a child >= 0 is a split, a child < 0 is leaf `~child`.

    A tree without a split is one split whose two sides are the same leaf.
    """

    feature: Integers  # [m]
    threshold: Floats  # [m]; x goes left when x <= threshold
    nan_left: Booleans  # [m]; NaN goes left
    left: Integers  # [m]
    right: Integers  # [m]
    leaf: Floats  # [m + 1], log-odds


@dataclass(frozen=True, slots=True)
class Forest:
    """All that decides a score: probability = 1 / (1 + exp(-scale * sum of the leaves))."""

    trees: tuple[Tree, ...]
    feature_names: tuple[str, ...]
    scale: float


def read_forest(text: str) -> Forest:
    """Read LightGBM's text format (all numbers in it are exact); refuse what ONNX cannot carry exactly.

    Not `dump_model`: its JSON says 1e+300 where the threshold is infinite, and +Inf would then go right.
    """
    end = re.search(r"^end of trees$", text, flags=re.M)
    if not text.startswith("tree\n") or not end:
        raise ExportError("this is not a whole LightGBM text model; write one with booster.save_model('model.txt')")
    head, *blocks = re.split(r"^(?=Tree=\d+$)", text[: end.start()], flags=re.M)
    header = _fields(head)
    if header.get("tree_sizes", "").split() != [str(len(block.encode())) for block in blocks]:
        raise ExportError("the LightGBM model was edited or cut off; write it again with booster.save_model")
    scale = _sigmoid_scale(header)
    if not blocks:
        raise ExportError("the model has no trees; train it for at least one round")
    names = tuple(header.get("feature_names", "").split(" "))
    trees = tuple(_tree(number, _fields(block), names) for number, block in enumerate(blocks))
    return Forest(trees, names, scale / len(trees) if "average_output" in header else scale)


def float32_thresholds(threshold: Floats) -> Floats:
    """The largest float32 that LightGBM sends left, per float64 threshold; shape [m], exact in float32.

    For every float32 x, NaN aside, `x <= result` is LightGBM's own answer. That is the threshold rounded
    down; except where LightGBM's reading of |x| <= ZERO as 0 moves the boundary to an end of that range.
    """
    with np.errstate(over="ignore"):
        nearest = threshold.astype(np.float32)
        down = np.where(nearest > threshold, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    below_zeros = np.nextafter(np.float32(-ZERO), np.float32(-np.inf))
    down = np.where((threshold >= -ZERO) & (threshold < 0), below_zeros, down)
    return np.where((threshold >= 0) & (threshold < ZERO), np.float32(ZERO), down).astype(np.float64)


def to_onnx(
    booster: lightgbm.Booster, *, feature_names: Sequence[str], calibration: Calibration | None = None
) -> onnx.ModelProto:
    """Build the graph: `features` float32 [n, F] -> `propensity` float32 [n], a probability.

    Columns are in the order of `feature_names`. Like `Booster.predict`, it stops at `best_iteration`. Without
    a calibration the probability is LightGBM's own. Leaves are added and the sigmoid is taken in float64.
    Raises ExportError for a model that cannot be carried exactly.
    """
    forest = read_forest(booster.model_to_string())
    _check_names(forest.feature_names, feature_names)
    slope, intercept = (calibration.slope, calibration.intercept) if calibration else (forest.scale, 0.0)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", [INPUT], ["features_64"], to=TensorProto.DOUBLE),
            _tree_ensemble(forest.trees, slope, intercept, "features_64", "log_odds"),
            helper.make_node("Sigmoid", ["log_odds"], ["probability_64"]),
            helper.make_node("Cast", ["probability_64"], ["probability"], to=TensorProto.FLOAT),
            helper.make_node("Squeeze", ["probability", "target_axis"], [OUTPUT]),
        ],
        "propensity",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", len(feature_names)])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(np.array([1], np.int64), "target_axis")],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="propensity")
    helper.set_model_props(model, {"feature_names": json.dumps(list(feature_names))})
    return model


def write(
    booster: lightgbm.Booster,
    out: Path,
    *,
    feature_names: Sequence[str],
    calibration: Calibration | None = None,
    rows: npt.NDArray[np.float32] | None = None,
    progress: Callable[[float], None] | None = None,
) -> parity.ParityReport:
    """Write `out`/model.onnx and `out`/parity.json if the parity gate passes, otherwise nothing.

    `rows` float32 [n, F] are real rows to compare as well; `progress` is told the share done, 0 to 1.
    Raises ExportError or ParityError.
    """
    model = to_onnx(booster, feature_names=feature_names, calibration=calibration).SerializeToString()
    report = parity.check(booster, model, calibration, rows=rows, progress=progress)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _replace(out / "model.onnx", model)
        _replace(out / "parity.json", (json.dumps(asdict(report), indent=2) + "\n").encode())
    except OSError as error:
        raise ExportError(f"cannot write {error.filename or out}: {error.strerror}") from error
    return report


def export_file(
    model: Path,
    out: Path,
    *,
    calibration: Calibration | None = None,
    progress: Callable[[float], None] | None = None,
) -> parity.ParityReport:
    """Export a LightGBM text model, as `booster.save_model` writes it, into the directory `out`."""
    try:
        text = model.read_bytes().decode()
    except OSError as error:
        raise ExportError(f"cannot read {model}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExportError(
            f"{model} is not a LightGBM text model; write one with booster.save_model('model.txt')"
        ) from error
    try:
        forest = read_forest(text)  # before LightGBM, which ends the whole process on a malformed file
        booster = lightgbm.Booster(model_str=text)
        return write(booster, out, feature_names=forest.feature_names, calibration=calibration, progress=progress)
    except (ExportError, lightgbm.basic.LightGBMError) as error:
        raise ExportError(f"{model}: {error}") from error


def _fields(block: str) -> dict[str, str]:
    return {name: value for name, _, value in (line.partition("=") for line in block.split("\n"))}


def _sigmoid_scale(header: dict[str, str]) -> float:
    """The factor of the raw score in LightGBM's own sigmoid."""
    objective, *options = header.get("objective", "").split() or [""]
    if objective == "cross_entropy":
        return 1.0
    if objective == "binary":
        return float(dict(option.split(":") for option in options).get("sigmoid", 1.0))
    if not objective:
        raise ExportError("the model names no objective (a custom loss); train it with objective=binary")
    raise ExportError(f"objective {objective} does not give one probability; train with objective=binary")


def _tree(number: int, fields: dict[str, str], names: tuple[str, ...]) -> Tree:
    if fields.get("is_linear") == "1":
        raise ExportError("the model has linear trees, which ONNX lacks; train with linear_tree=false")
    try:
        splits = int(fields["num_leaves"]) - 1
        leaf = _numbers(fields, "leaf_value", np.float64, splits + 1)
        if not splits:
            zero = np.zeros(1, np.int64)
            return Tree(zero, np.zeros(1), np.zeros(1, np.bool_), ~zero, ~zero, leaf)
        feature = _numbers(fields, "split_feature", np.int64, splits)
        threshold = _numbers(fields, "threshold", np.float64, splits)
        decision = _numbers(fields, "decision_type", np.int64, splits)
        left = _numbers(fields, "left_child", np.int64, splits)
        right = _numbers(fields, "right_child", np.int64, splits)
    except (KeyError, ValueError) as error:
        raise ExportError(f"tree {number} of the LightGBM model is malformed: {error}") from error
    if not _is_tree(left, right) or not ((feature >= 0) & (feature < len(names))).all():
        raise ExportError(f"tree {number} of the LightGBM model is malformed: not a binary tree of its features")
    if np.isnan(threshold).any() or not np.isfinite(leaf).all():
        raise ExportError(f"tree {number} has a NaN threshold or an infinite leaf; check labels and weights")
    missing = decision >> 2
    _refuse(
        number,
        decision & CATEGORICAL,
        feature,
        names,
        "is a native categorical",
        "encode it in the feature spec (categories, or a ratio) and train without categorical_feature",
    )
    _refuse(number, missing == MISSING_IS_ZERO, feature, names, "reads 0 as missing",
            "train with zero_as_missing=false and leave missing values as NaN")  # fmt: skip
    # A split that met no NaN in training reads NaN as 0.
    nan_left = np.where(missing == MISSING_IS_NAN, decision & DEFAULT_LEFT != 0, threshold >= 0)
    return Tree(feature, threshold, nan_left, left, right, leaf)


def _numbers(fields: dict[str, str], name: str, dtype: type[np.generic], count: int) -> npt.NDArray[Any]:
    values = np.array(fields[name].split(), dtype)
    if len(values) != count:
        raise ValueError(f"{len(values)} values of {name} where {count} are needed")
    return values


def _is_tree(left: Integers, right: Integers) -> bool:
    """Every split but the root and every leaf is the child of one earlier split."""
    splits = len(left)
    children = np.concatenate([left, right])
    expected = np.concatenate([np.arange(-splits - 1, 0), np.arange(1, splits)])
    later = (children < 0) | (children > np.tile(np.arange(splits), 2))
    return np.array_equal(np.sort(children), expected) and bool(later.all())


def _refuse(
    number: int, found: npt.NDArray[Any], feature: Integers, names: tuple[str, ...], fault: str, remedy: str
) -> None:
    if found.any():
        split = int(np.flatnonzero(found)[0])
        raise ExportError(f"tree {number}, split {split}: feature {names[feature[split]]} {fault}; {remedy}")


def _check_names(trained: Sequence[str], given: Sequence[str]) -> None:
    if len(trained) != len(given):
        raise ExportError(f"{len(given)} feature names for a model of {len(trained)} features; name each column")
    if list(trained) == [f"Column_{index}" for index in range(len(trained))]:  # trained without names
        return
    for index, (ours, theirs) in enumerate(zip(trained, given, strict=True)):
        if ours != theirs.replace(" ", "_"):  # as LightGBM keeps it
            raise ExportError(f"column {index} of the model is {ours}, not {theirs}; keep the order of training")


def _tree_ensemble(trees: Sequence[Tree], slope: float, intercept: float, source: str, target: str) -> onnx.NodeProto:
    """One TreeEnsemble in float64 whose sum is slope * margin + intercept."""
    roots: list[int] = []
    true_branch, false_branch, weights = [], [], []
    split = leaf = 0  # where the next tree begins in the arrays of the whole ensemble
    for tree in trees:
        first, second = _position(tree.left[:1], split, leaf), _position(tree.right[:1], split, leaf)
        if tree.left[0] != tree.right[0] and first == second:
            # ONNX Runtime up to 1.23 takes a root for a leaf when its split child and its leaf child have the
            # same number (microsoft/onnxruntime#24679); an unused leaf between sets them apart.
            weights.append(np.zeros(1))
            leaf += 1
        roots.append(split)
        true_branch.append(_position(tree.left, split, leaf))
        false_branch.append(_position(tree.right, split, leaf))
        weights.append(slope * tree.leaf + (0.0 if split else intercept))
        split, leaf = split + len(tree.feature), leaf + len(tree.leaf)
    leaf_weights = np.concatenate(weights)
    if not np.isfinite(leaf_weights).all():
        raise ExportError(f"slope {slope} or intercept {intercept} is too large; fit the calibration again")
    left, right = (np.concatenate([getattr(tree, side) for tree in trees]) for side in ("left", "right"))
    thresholds = float32_thresholds(np.concatenate([tree.threshold for tree in trees]))
    return helper.make_node(
        "TreeEnsemble",
        [source],
        [target],
        domain="ai.onnx.ml",
        n_targets=1,
        tree_roots=roots,
        nodes_featureids=np.concatenate([tree.feature for tree in trees]).tolist(),
        nodes_modes=numpy_helper.from_array(np.full(split, BRANCH_LEQ, np.uint8)),
        nodes_splits=numpy_helper.from_array(thresholds),
        nodes_missing_value_tracks_true=np.concatenate([tree.nan_left for tree in trees]).astype(int).tolist(),
        nodes_truenodeids=np.concatenate(true_branch).tolist(),
        nodes_trueleafs=(left < 0).astype(int).tolist(),
        nodes_falsenodeids=np.concatenate(false_branch).tolist(),
        nodes_falseleafs=(right < 0).astype(int).tolist(),
        leaf_targetids=[0] * len(leaf_weights),
        leaf_weights=numpy_helper.from_array(leaf_weights),
    )


def _position(child: Integers, split: int, leaf: int) -> Integers:
    """Children of one tree as places in the arrays of the ensemble."""
    return np.where(child < 0, leaf + ~child, split + child)


def _replace(path: Path, content: bytes) -> None:
    """Write the whole file or nothing."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)
