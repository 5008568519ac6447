"""Owns the parity gate: an exported graph passes if it sends every row to the leaves where LightGBM sends it.

The gate shares no code with `training.export`: it reads the booster and the ONNX bytes by itself, so that a
fault of the export cannot hide here. LightGBM's own answers are what everything is compared with.

A *probe* is one value at one split: the float32 neighbours of its threshold, 0, -0, NaN, +-Inf, +-1e-35 and
their neighbours, in a row that meets every condition on the way from the root to the split. The rows that
serve a probe form a box: per feature an interval in a sorted pool of float32 values, and whether NaN will do.
The pool holds the float32 neighbours of every threshold, so a split whose box is empty is one that no float32
row reaches. Probes whose boxes intersect share a row; every row is compared in every tree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightgbm
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from service.core.errors import PropensityError

if TYPE_CHECKING:
    from training.export import Calibration

INPUT, OUTPUT = "features", "propensity"
BUG = "nothing is exported; please report this with the model, it is a bug of the export"
TOLERANCE = 1e-6  # of a probability
ZERO = float(np.float32(1e-35))  # LightGBM reads every |x| <= ZERO as 0 when it predicts
ORDINARY_ROWS = 2_000
BOX_CELLS = 4_000_000  # probes x features at a time: 9 bytes each, some copies of that while rows are shared
LEAF_CELLS = 4_000_000  # rows x trees at a time

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.float32]
NO_PROBES: Array = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What the gate compared; it exists only for a graph that passed."""

    trees: int
    splits: int
    unreachable: tuple[tuple[int, int], ...]  # (tree, split) that no float32 row reaches
    probes: int  # values at splits
    rows: int  # compared: those of the probes, ordinary random ones, and the caller's
    leaves: int  # compared: rows x trees; each led where LightGBM leads
    max_difference: float  # of a probability, from LightGBM in float64


class ParityError(PropensityError):
    """The graph differs from LightGBM, on `row`, at `tree` and `split` as LightGBM numbers them."""

    def __init__(
        self,
        message: str,
        tree: int | None = None,
        split: int | None = None,
        row: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(message)
        self.tree, self.split, self.row = tree, split, row


def check(
    booster: lightgbm.Booster,
    model: bytes,
    calibration: Calibration | None = None,
    *,
    rows: Rows | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> ParityReport:
    """Compare ONNX bytes with a booster and its calibration; raise ParityError at the first difference.

    Routing: for each row and each tree the leaf is the same in `Booster.predict(pred_leaf=True)`, in ONNX
    Runtime running the graph's own ensemble with leaf numbers for weights, and, at the split that the row was
    built for, in a plain evaluation of the ensemble's attributes.
    Score: |p - q| <= 1e-6 for p the graph's float32 output and q LightGBM's probability, or the sigmoid of
    slope * margin + intercept, in float64. No margin is exempt. Sums in float32 would bound the margins for
    which this holds; the graph adds in float64 and rounds only the probability, at most 1, by at most 3e-8.

    `rows` float32 [n, F] are compared too. `progress` is told the share done, 0 to 1.
    """
    gate = _Gate(booster, model, calibration)
    rng = np.random.default_rng(seed)
    pool = _Pool(gate.forest, gate.features)
    extra = [_ordinary_rows(pool, rng), *([] if rows is None else [_float32(rows, gate.features)])]
    for some in extra:
        gate.compare(some)
    unreachable: list[tuple[int, int]] = []
    probes, done = 0, 0.0
    for boxes in _grouped(_boxes(gate.forest, pool, unreachable), gate.features):
        shared, owner = _share(boxes, rng)
        by_row = np.argsort(owner, kind="stable")
        before, done = done, (1 + int(boxes.split.max())) / len(gate.forest.feature)
        told = _share_told(progress, before, done)
        gate.compare(_rows(shared, pool, rng), owner[by_row], boxes.split[by_row], told)
        probes += len(owner)
    return ParityReport(
        trees=gate.forest.trees,
        splits=len(gate.forest.feature),
        unreachable=tuple(unreachable),
        probes=probes,
        rows=gate.rows,
        leaves=gate.rows * gate.forest.trees,
        max_difference=gate.max_difference,
    )


def _share_told(
    progress: Callable[[float], None] | None, before: float, after: float
) -> Callable[[float], None] | None:
    """Tell a part's share as a share of the whole."""
    return progress and (lambda share: progress(before + share * (after - before)))


@dataclass(frozen=True, slots=True)
class _Forest:
    """LightGBM's trees, one after another; a child >= 0 is a split of its tree, a child < 0 is leaf `~child`.

    The leaves under a split are, counted from left to right, those from `first` up to `last`.
    """

    split_start: Array  # int64[trees + 1], where a tree's splits begin in the arrays below
    leaf_start: Array  # int64[trees + 1], where its leaves begin in `rank`
    tree: Array  # int64[splits], the tree of a split
    feature: Array  # int64[splits]
    threshold: Array  # float64[splits]
    nan_left: Array  # bool[splits]
    left: Array  # int64[splits]
    right: Array  # int64[splits]
    first: Array  # int64[splits]
    last: Array  # int64[splits]
    rank: Array  # int64[leaves], a leaf's place from left to right in its tree

    @property
    def trees(self) -> int:
        return len(self.leaf_start) - 1

    def splits(self, tree: int) -> slice:
        return slice(int(self.split_start[tree]), int(self.split_start[tree + 1]))

    def leaves(self, tree: int) -> slice:
        return slice(int(self.leaf_start[tree]), int(self.leaf_start[tree + 1]))


def _forest(booster: lightgbm.Booster) -> _Forest:
    text = booster.model_to_string().partition("\nend of trees")[0]
    blocks = re.split(r"^(?=Tree=\d+$)", text, flags=re.M)[1:]
    fields = [dict(line.split("=", 1) for line in block.split("\n") if "=" in line) for block in blocks]

    def flat(name: str, dtype: type) -> Array:
        return np.array([value for tree in fields for value in tree[name].split()], dtype)

    threshold, decision = flat("threshold", np.float64), flat("decision_type", np.int64)
    left, right = flat("left_child", np.int64), flat("right_child", np.int64)
    leaves = [int(tree["num_leaves"]) for tree in fields]
    split_start, leaf_start = (np.cumsum([0, *counts]) for counts in ([n - 1 for n in leaves], leaves))
    spans = [_spans(left[a:b], right[a:b]) for a, b in zip(split_start[:-1], split_start[1:], strict=True)]
    first, last, rank = (np.concatenate(part) for part in zip(*spans, strict=True))
    return _Forest(
        split_start=split_start,
        leaf_start=leaf_start,
        tree=np.repeat(np.arange(len(leaves)), np.diff(split_start)),
        feature=flat("split_feature", np.int64),
        threshold=threshold,
        nan_left=np.where((decision >> 2) == 2, (decision & 2) != 0, threshold >= 0),
        left=left,
        right=right,
        first=first,
        last=last,
        rank=rank,
    )


def _spans(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """`first`, `last` and `rank` of one tree; LightGBM numbers a split after its parent."""
    splits = len(left)
    size = np.ones(2 * splits + 1, np.int64)  # leaves below; a leaf's entry, size[~leaf], is from the end
    for split in range(splits - 1, -1, -1):
        size[split] = size[left[split]] + size[right[split]]
    first = np.zeros(2 * splits + 1, np.int64)
    for split in range(splits):
        first[left[split]] = first[split]
        first[right[split]] = first[split] + size[left[split]]
    return first[:splits], first[:splits] + size[:splits], first[splits:][::-1]


class _Pool:
    """Per feature the float32 values from which rows are made, sorted, and where each split divides them."""

    def __init__(self, forest: _Forest, features: int) -> None:
        with np.errstate(over="ignore"):
            nearest = forest.threshold.astype(np.float32)[:, None]
            around = [np.nextafter(nearest, np.float32(end)) for end in (-np.inf, np.inf)]
        zero = np.float32(ZERO)
        edge = np.array([np.nextafter(zero, np.float32(0)), zero, np.nextafter(zero, np.float32(1))])
        special = np.concatenate([[0.0, -0.0, np.inf, -np.inf], edge, -edge]).astype(np.float32)
        values = np.hstack([nearest, *around, np.tile(special, (len(nearest), 1))])
        # int32[splits, values]: where the probes are in the pool of the split's feature
        self.place: Array = np.empty(values.shape, np.int32)
        # int32[splits]: how many values of that pool go left
        self.cut: Array = np.empty(len(values), np.int32)
        sorted_values = []
        for feature in range(features):
            splits = np.flatnonzero(forest.feature == feature)
            keys = np.unique(np.concatenate([_sort_key(values[splits]).ravel(), _sort_key(special)]))
            pool = _sort_key(keys).view(np.float32)
            read = np.where(np.abs(pool) <= np.float32(ZERO), 0.0, pool.astype(np.float64))
            self.place[splits] = np.searchsorted(keys, _sort_key(values[splits]))
            self.cut[splits] = np.searchsorted(read, forest.threshold[splits], side="right")
            sorted_values.append(pool)
        self.size = np.array([len(pool) for pool in sorted_values], np.int32)
        self.start = np.cumsum(self.size) - self.size
        self.values: Rows = np.concatenate(sorted_values)


def _sort_key(values: Array) -> Array:
    """Map float32 to int32 in the same order, -0 before 0; and back (the mapping is its own inverse)."""
    bits = values.view(np.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@dataclass(frozen=True, slots=True)
class _Boxes:
    """Box i: rows whose feature f is one of pool[low[i, f] : high[i, f]], or NaN where nan[i, f] is true."""

    low: Array  # int32[boxes, features]
    high: Array  # int32[boxes, features]
    nan: Array  # bool[boxes, features]
    split: Array  # int64[boxes], in the arrays of the forest; of shared boxes: empty

    def take(self, chosen: Array) -> _Boxes:
        return _Boxes(*(part[chosen] for part in (self.low, self.high, self.nan, self.split)))


def _boxes(forest: _Forest, pool: _Pool, unreachable: list[tuple[int, int]]) -> Iterator[_Boxes]:
    """Yield the probes of all splits, a tree or a part of a tree at a time; note the splits without a row."""
    features = len(pool.size)
    step = max(1, BOX_CELLS // (features * (pool.place.shape[1] + 2)))
    for tree in range(forest.trees):
        splits = forest.splits(tree)
        regions = _regions(forest, pool, splits)
        reached = ((regions.low < regions.high) | regions.nan).all(axis=1)
        unreachable.extend((tree, int(split)) for split in np.flatnonzero(~reached))
        chosen = np.flatnonzero(reached)
        for start in range(0, len(chosen), step):
            yield _probes(regions.take(chosen[start : start + step]), forest, pool)


def _regions(forest: _Forest, pool: _Pool, splits: slice) -> _Boxes:
    """Per split of a tree, the box of the rows that reach it."""
    count, features = splits.stop - splits.start, len(pool.size)
    low = np.zeros((count, features), np.int32)
    high = np.tile(pool.size, (count, 1))
    nan = np.ones((count, features), np.bool_)
    for split in range(count):
        at = splits.start + split
        feature, cut, nan_left = forest.feature[at], pool.cut[at], forest.nan_left[at]
        for child, goes_left in ((forest.left[at], True), (forest.right[at], False)):
            if child < 0:
                continue
            low[child], high[child], nan[child] = low[split], high[split], nan[split]
            if goes_left:
                high[child, feature] = min(high[child, feature], cut)
            else:
                low[child, feature] = max(low[child, feature], cut)
            nan[child, feature] &= nan_left == goes_left
    return _Boxes(low, high, nan, np.arange(splits.start, splits.stop))


def _probes(regions: _Boxes, forest: _Forest, pool: _Pool) -> _Boxes:
    """Narrow each region to each value of the split's feature that it holds, to NaN, and once not at all."""
    every = np.arange(len(regions.split))
    feature = forest.feature[regions.split]
    place = pool.place[regions.split]
    inside = (place >= regions.low[every, feature, None]) & (place < regions.high[every, feature, None])
    region, value = np.nonzero(inside)
    with_nan = np.flatnonzero(regions.nan[every, feature])
    boxes = regions.take(np.concatenate([region, with_nan, every]))
    valued, feature = np.arange(len(region)), feature[np.concatenate([region, with_nan])]
    boxes.low[valued, feature[valued]] = place[region, value]
    boxes.high[valued, feature[valued]] = place[region, value] + 1
    boxes.nan[valued, feature[valued]] = False
    empty = np.arange(len(region), len(feature))
    boxes.high[empty, feature[empty]] = boxes.low[empty, feature[empty]]
    return boxes


def _grouped(pieces: Iterator[_Boxes], features: int) -> Iterator[_Boxes]:
    """Join pieces into groups of about BOX_CELLS cells."""
    group: list[_Boxes] = []
    for piece in pieces:
        if group and sum(len(one.split) for one in [*group, piece]) * features > BOX_CELLS:
            yield _joined(group)
            group = []
        group.append(piece)
    if group:
        yield _joined(group)


def _joined(group: list[_Boxes]) -> _Boxes:
    low, high, nan, split = (
        np.concatenate([getattr(boxes, part) for boxes in group]) for part in ("low", "high", "nan", "split")
    )
    return _Boxes(low, high, nan, split)


def _share(boxes: _Boxes, rng: np.random.Generator) -> tuple[_Boxes, Array]:
    """Intersect random pairs until few fit; return what is left and, per given box, which one serves it."""
    low, high, nan = boxes.low, boxes.high, boxes.nan
    owner = np.arange(len(low))
    while True:
        order = rng.permutation(len(low))
        one, other = order[: len(low) // 2], order[len(low) // 2 : len(low) // 2 * 2]
        both = np.maximum(low[one], low[other]), np.minimum(high[one], high[other]), nan[one] & nan[other]
        fits = ((both[0] < both[1]) | both[2]).all(axis=1)
        if np.count_nonzero(fits) * 200 < len(low) or len(low) < 2:
            return _Boxes(low, high, nan, boxes.split[:0]), owner
        alone = np.concatenate([one[~fits], other[~fits], order[2 * len(one) :]])
        number = np.empty(len(low), np.int64)
        pairs = np.count_nonzero(fits)
        number[one[fits]] = number[other[fits]] = np.arange(pairs)
        number[alone] = np.arange(pairs, pairs + len(alone))
        owner = number[owner]
        low, high, nan = (
            np.concatenate([new[fits], old[alone]]) for new, old in zip(both, (low, high, nan), strict=True)
        )


def _rows(boxes: _Boxes, pool: _Pool, rng: np.random.Generator) -> Rows:
    """One random row of each box."""
    width = np.maximum(boxes.high - boxes.low, 0)
    nan = (width == 0) | (boxes.nan & (rng.random(width.shape, np.float32) < 0.1))
    place = boxes.low + np.minimum(rng.random(width.shape, np.float32) * width, width - 1).astype(np.int32)
    rows: Rows = pool.values[pool.start + np.where(nan, 0, place)]
    rows[nan] = np.nan
    return rows


def _ordinary_rows(pool: _Pool, rng: np.random.Generator) -> Rows:
    """Rows between the thresholds, a tenth of the values missing."""
    rows = np.empty((ORDINARY_ROWS, len(pool.size)), np.float32)
    for feature, (start, size) in enumerate(zip(pool.start, pool.size, strict=True)):
        values = pool.values[start : start + size].astype(np.float64)
        values = values[np.isfinite(values)]
        place, share = rng.integers(0, len(values) - 1, len(rows)), rng.random(len(rows))
        rows[:, feature] = values[place] + share * (values[place + 1] - values[place])
    rows[rng.random(rows.shape) < 0.1] = np.nan
    return rows


def _float32(rows: Rows, features: int) -> Rows:
    if rows.ndim != 2 or rows.shape[1] != features:
        raise ParityError(f"rows of shape {rows.shape} for a model of {features} features; give [n, {features}]")
    return np.ascontiguousarray(rows, np.float32)


@dataclass(frozen=True, slots=True)
class _Ensemble:
    """The attributes of the graph's TreeEnsemble; a child >= 0 is a node, a child < 0 is leaf `~child`."""

    roots: Array
    feature: Array
    threshold: Array
    nan_true: Array
    true: Array
    false: Array
    leaves: int

    def leaf(self, roots: Array, rows: Rows, row: Array) -> Array:
        """The leaf of rows[row[i]] in the tree of roots[i], by the operator's definition of <= and of NaN."""
        at = roots.copy()
        active = np.arange(len(at))
        while len(active):
            node = at[active]
            value = rows[row[active], self.feature[node]]
            is_true = (value <= self.threshold[node]) | (np.isnan(value) & self.nan_true[node])
            at[active] = np.where(is_true, self.true[node], self.false[node])
            active = active[at[active] >= 0]
        return ~at


def _ensemble(node: onnx.NodeProto) -> _Ensemble:
    attribute = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if numpy_helper.to_array(attribute["nodes_modes"]).any():
        raise ParityError(f"the graph compares otherwise than by <=; {BUG}")
    true, false = (
        np.where(np.array(attribute[f"nodes_{side}leafs"]) == 1, ~ids, ids)
        for side in ("true", "false")
        for ids in [np.array(attribute[f"nodes_{side}nodeids"])]
    )
    return _Ensemble(
        roots=np.array(attribute["tree_roots"]),
        feature=np.array(attribute["nodes_featureids"]),
        threshold=numpy_helper.to_array(attribute["nodes_splits"]),
        nan_true=np.array(attribute["nodes_missing_value_tracks_true"]) == 1,
        true=true,
        false=false,
        leaves=len(attribute["leaf_targetids"]),
    )


def _leaf_places(forest: _Forest, ensemble: _Ensemble) -> Array:
    """Per LightGBM leaf its number in the ensemble, found by walking both trees at once; int64[leaves]."""
    if forest.trees != len(ensemble.roots):
        raise ParityError(f"the graph has {len(ensemble.roots)} trees, LightGBM {forest.trees}; {BUG}")
    places = np.empty(len(forest.rank), np.int64)
    for tree, root in enumerate(ensemble.roots):
        splits, leaves = forest.splits(tree), places[forest.leaves(tree)]
        node = np.full(splits.stop - splits.start, root)
        for split in range(len(node)):
            for ours, theirs in ((forest.left, ensemble.true), (forest.right, ensemble.false)):
                child, found = ours[splits.start + split], theirs[node[split]]
                if (child < 0) != (found < 0):
                    raise ParityError(f"tree {tree}, split {split}: the graph has another shape; {BUG}", tree, split)
                if child < 0:
                    leaves[~child] = ~found
                else:
                    node[child] = found
        if not len(node):
            if not ensemble.true[root] == ensemble.false[root] < 0:
                raise ParityError(f"tree {tree}: the graph splits where LightGBM has one leaf; {BUG}", tree)
            leaves[0] = ~ensemble.true[root]
    if len(np.unique(places)) < len(places):
        raise ParityError(f"the graph uses one leaf in two places; {BUG}")
    return places


def _session(model: bytes) -> onnxruntime.InferenceSession:
    """As the service runs it: one thread, sequential, no spinning."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _leaf_session(model: onnx.ModelProto, at: int, forest: _Forest, places: Array) -> onnxruntime.InferenceSession:
    """The graph up to its ensemble, in which every tree is a target and a leaf weighs its LightGBM number."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    del cut.graph.node[at + 1 :], cut.graph.output[:]
    node = cut.graph.node[at]
    weights = next(one for one in node.attribute if one.name == "leaf_weights")
    leaves, dtype = weights.t.dims[0], weights.t.data_type
    count = np.diff(forest.leaf_start)
    target, number = np.zeros(leaves, np.int64), np.zeros(leaves, helper.tensor_dtype_to_np_dtype(dtype))
    target[places] = np.repeat(np.arange(forest.trees), count)
    number[places] = np.arange(len(places)) - np.repeat(forest.leaf_start[:-1], count)
    kept = [one for one in node.attribute if one.name not in ("n_targets", "leaf_targetids", "leaf_weights")]
    changed = {"n_targets": forest.trees, "leaf_targetids": target.tolist()}
    attributes = [helper.make_attribute(name, value) for name, value in changed.items()]
    attributes.append(helper.make_attribute("leaf_weights", numpy_helper.from_array(number)))
    del node.attribute[:]
    node.attribute.extend([*kept, *attributes])
    cut.graph.output.append(helper.make_tensor_value_info(node.output[0], dtype, ["n", forest.trees]))
    return _session(cut.SerializeToString())


class _Gate:
    """A booster and a graph side by side; `compare` raises at the first difference, and counts."""

    def __init__(self, booster: lightgbm.Booster, model: bytes, calibration: Calibration | None) -> None:
        graph = onnx.load_model_from_string(model)
        ensembles = [at for at, node in enumerate(graph.graph.node) if node.op_type == "TreeEnsemble"]
        if len(ensembles) != 1:
            raise ParityError(f"the graph has {len(ensembles)} TreeEnsemble nodes, not 1; {BUG}")
        self.booster, self.calibration = booster, calibration
        self.features, self.names = booster.num_feature(), booster.feature_name()
        self.forest = _forest(booster)
        self.ensemble = _ensemble(graph.graph.node[ensembles[0]])
        self.places = _leaf_places(self.forest, self.ensemble)
        self.leaf_session = _leaf_session(graph, ensembles[0], self.forest, self.places)
        self.session = _session(model)
        self.rows, self.max_difference = 0, 0.0

    def compare(
        self,
        rows: Rows,
        probe_row: Array = NO_PROBES,
        probe_split: Array = NO_PROBES,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Compare rows, of which row probe_row[i] (ascending) was built for split probe_split[i]."""
        step = max(1, LEAF_CELLS // self.forest.trees)
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            here = slice(*np.searchsorted(probe_row, [start, start + len(block)]))
            self._compare_leaves(block, probe_row[here] - start, probe_split[here])
            self._compare_scores(block, probe_row[here] - start, probe_split[here])
            self.rows += len(block)
            if progress:
                progress((start + len(block)) / len(rows))

    def _compare_leaves(self, rows: Rows, probe_row: Array, probe_split: Array) -> None:
        forest, ensemble = self.forest, self.ensemble
        leaf = np.asarray(self.booster.predict(rows, pred_leaf=True)).reshape(len(rows), forest.trees)
        tree = forest.tree[probe_split]
        expected = forest.leaf_start[tree] + leaf[probe_row, tree]
        place = forest.rank[expected]
        if ((place < forest.first[probe_split]) | (place >= forest.last[probe_split])).any():
            raise ParityError("LightGBM leads a probe past the split it was built for: a bug of the parity gate")
        evaluated = ensemble.leaf(ensemble.roots[tree], rows, probe_row)
        if (wrong := evaluated != self.places[expected]).any():
            probe = int(np.argmax(wrong))
            found = self.places[forest.leaves(tree[probe])].tolist().index(evaluated[probe])
            raise self._misrouted(rows[probe_row[probe]], tree[probe], leaf[probe_row[probe]], found, "the graph")
        reached = self.leaf_session.run(None, {INPUT: rows})[0]
        if (reached != leaf).any():
            row, at = np.argwhere(reached != leaf)[0]
            raise self._misrouted(rows[row], at, leaf[row], int(reached[row, at]), "ONNX Runtime")

    def _misrouted(self, row: Rows, tree: int, leaf: Array, found: int, who: str) -> ParityError:
        """Name the split of the tree at which the ways to LightGBM's leaf and to leaf `found` part."""
        forest, start = self.forest, int(self.forest.split_start[tree])
        low, high = sorted(forest.rank[forest.leaves(tree)][[leaf[tree], found]])
        split, way = 0, {}
        while True:
            at = start + split
            way[self.names[forest.feature[at]]] = row[forest.feature[at]]
            left = int(forest.left[at])
            middle = forest.first[at] + 1 if left < 0 else forest.last[start + left]
            if low < middle <= high:
                break
            split = left if high < middle else int(forest.right[at])
        condition = f"{self.names[forest.feature[at]]} <= {forest.threshold[at]}"
        return ParityError(
            f"tree {tree}, split {split} ({condition}): LightGBM goes to leaf {leaf[tree]}, {who} to leaf "
            f"{found}, on the row with {_values(way)}; {BUG}",
            int(tree),
            split,
            tuple(row.tolist()),
        )

    def _compare_scores(self, rows: Rows, probe_row: Array, probe_split: Array) -> None:
        expected = self._probability(rows)
        # The service asks for one row, for a few and for many, which are different loops in ONNX Runtime.
        parts = np.split(rows, [*range(1, 17), *range(32, 257, 16)])
        found = np.concatenate([self._graph_probability(part) for part in parts if len(part)])
        difference = np.abs(found - expected)
        if (wrong := ~(difference <= TOLERANCE)).any():
            at = int(np.argmax(wrong))
            tree = split = None
            if len(served := probe_split[probe_row == at]):
                tree = int(self.forest.tree[served[0]])
                split = int(served[0] - self.forest.split_start[tree])
            place = "a row" if tree is None else f"tree {tree}, split {split}: the row"
            values = _values(dict(zip(self.names, rows[at], strict=True)))
            raise ParityError(
                f"{place} with {values} scores {found[at]} in ONNX Runtime and {expected[at]} in LightGBM, "
                f"over {TOLERANCE} apart, by the same leaves; {BUG}",
                tree,
                split,
                tuple(rows[at].tolist()),
            )
        self.max_difference = max(self.max_difference, float(difference.max()))

    def _probability(self, rows: Rows) -> Array:
        """LightGBM's probability, calibrated; float64[n]."""
        if not self.calibration:
            return np.asarray(self.booster.predict(rows))
        margin = np.asarray(self.booster.predict(rows, raw_score=True))
        log_odds = self.calibration.slope * margin + self.calibration.intercept
        with np.errstate(over="ignore"):
            return np.asarray(1.0 / (1.0 + np.exp(-log_odds)))

    def _graph_probability(self, rows: Rows) -> Array:
        found = self.session.run([OUTPUT], {INPUT: rows})[0]
        if found.shape != (len(rows),) or found.dtype != np.float32:
            shape = list(found.shape)
            raise ParityError(f"the graph answers {found.dtype}{shape} to {len(rows)} rows, not float32[n]; {BUG}")
        return np.asarray(found, np.float64)


def _values(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!s}" for name, value in row.items())
