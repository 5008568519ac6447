"""Plots as inline SVG: text stays text, colours are the page's CSS variables, the same data gives the same bytes."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from service.core.segments import SEGMENTS
from training import evaluate
from training.evaluate import Curve, Floats, Labels
from training.report.data import Importance, Scored, spaced

# Stand-ins that matplotlib draws with; each is replaced by a variable of the page's style sheet.
INK, MUTED, LINE, CARD, MODEL, FIRST, SECOND = (f"#01010{place}" for place in range(7))
SHADES: Final = tuple(f"#01020{place}" for place in range(len(SEGMENTS)))
_VARIABLES: Final = {
    INK: "ink", MUTED: "muted", LINE: "line", CARD: "card", MODEL: "model", FIRST: "first", SECOND: "second",
    **{shade: f"s{place}" for place, shade in enumerate(SHADES)},
}  # fmt: skip
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
}
_WIDTH: Final = 4.8  # inches; 346 units of the SVG, which is as wide as a telephone
_LOW_TO_HIGH: Final = LinearSegmentedColormap.from_list("value", ["#2b83f6", "#9a5bd0", "#ea2e6c"])
# Of baselines, as `.b1` to `.b4` of the style sheet; a fifth begins anew.
_LINES: Final = ((FIRST, (4, 2)), (FIRST, (1, 1.5)), (SECOND, (4, 2)), (SECOND, (1, 1.5)))
_PERCENTS: Final = (0, 1e-4, 5e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1)
_CHANCES: Final = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 0.999, 0.9999)


def style() -> AbstractContextManager[None]:
    """What every plot of a page is drawn within; it changes matplotlib's settings and puts them back."""
    return matplotlib.rc_context(_STYLE)


def percent(share: float) -> str:
    """A share as people read it: 12%, 4.3%, 0.05%."""
    value = 100 * share
    digits = 0 if value == 0 or value >= 9.95 else 1 if value >= 0.95 else 2 if value >= 0.095 else 3
    return f"{value:.0f}%" if abs(value - round(value)) < 1e-9 else f"{value:.{digits}f}%"


def compact(value: float) -> str:
    """A number in at most some five characters: 0.25, 12, 3.4k, 5M."""
    size = abs(value)
    for limit, unit in ((1e15, ""), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit and size >= limit * 0.9995:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def roc(label: Labels, scored: Mapping[str, Scored]) -> str:
    """Receiver operating characteristic of the model, first, and its baselines."""
    figure, axes = _figure(4.0)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, dashes=(1, 3))
    for place, one in enumerate(scored.values()):
        hit, wrong = _rates(evaluate.curve(label, one.probability))
        axes.plot(wrong, hit, **_line(place))
    _unit_square(axes, "Share of the others ranked above the cut", "Share of conversions ranked above the cut")
    return _svg(figure, "roc", "ROC curves. " + _spoken(scored, "roc_auc", "ROC-AUC"))


def precision_recall(label: Labels, scored: Mapping[str, Scored]) -> str:
    """Precision against recall of the model, first, and its baselines."""
    figure, axes = _figure(4.0)
    for place, one in enumerate(scored.values()):
        points = evaluate.curve(label, one.probability)
        found = points.positives > 0
        recall, precision = (points.positives / points.positives[-1])[found], (points.positives / points.rows)[found]
        kept = _thin(recall)
        recall, precision = np.append(0, recall[kept]), np.append(precision[kept[0]], precision[kept])
        axes.plot(recall, precision, **_line(place))
    _unit_square(axes, "Recall: share of conversions found", "Precision: share that converts")
    return _svg(figure, "pr", "Precision-recall curves. " + _spoken(scored, "average_precision", "Average precision"))


def calibration(label: Labels, probability: Floats) -> str:
    """Predicted against observed rates with Wilson intervals, over a histogram of the scores."""
    mean, rate, rows = evaluate.calibration_bins(probability, label.astype(np.float64), groups(label))
    low, high = evaluate.wilson(rate * rows, rows)
    top = min(1.0, 1.06 * max(float(high.max()), float(mean.max())))
    figure = Figure(figsize=(_WIDTH, 4.4), facecolor="none")
    axes, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1), "hspace": 0.08})
    figure.subplots_adjust(left=0.145, right=0.955, bottom=0.12, top=0.97)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, dashes=(3, 3))
    x, y = np.sqrt(mean), np.sqrt(rate)
    if len(x) > 1:
        axes.fill_between(x, np.sqrt(low), np.sqrt(high), color=MODEL, alpha=0.15, linewidth=0)
    axes.plot(x, y, color=MODEL, marker="o", markersize=4, clip_on=False)
    axes.vlines(x, np.sqrt(low), np.sqrt(high), color=MODEL, linewidth=1)
    edge = np.sqrt(top)
    places = _spread(_PERCENTS, np.sqrt(_PERCENTS), 0, edge, 9)
    axes.set(xlim=(0, edge), ylim=(0, edge), ylabel="Observed rate")
    axes.set_yticks(np.sqrt(places), [_mark(place) for place in places])
    axes.tick_params(length=0)
    counts, edges = np.histogram(np.sqrt(np.clip(probability, 0, top)), 40, (0, edge))
    below.stairs(counts, edges, fill=True, color=MODEL, alpha=0.6)
    below.set(xlabel="Predicted probability", ylabel="Rows", ylim=(0, None))
    below.set_yticks([0, counts.max()], ["0", compact(counts.max())])
    below.set_xticks(np.sqrt(places), [_mark(place) for place in places])
    below.grid(visible=False)
    worst = int(np.argmax(np.abs(mean - rate)))
    gap = f"{percent(mean[worst])} predicted, {percent(rate[worst])} observed"
    text = f"Calibration in {len(mean)} groups. The largest gap: {gap}."
    return _svg(figure, "calibration", text)


def cumulative_gains(label: Labels, scored: Mapping[str, Scored]) -> str:
    """Share of conversions found in the best x % of rows."""
    figure, axes = _figure(4.0)
    depths = np.linspace(0, 1, 201)
    base = float(label.mean())
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, dashes=(1, 3))
    axes.plot([0, base, 1], [0, 1, 1], color=MUTED, linewidth=0.9, dashes=(4, 3))
    for place, one in enumerate(scored.values()):
        found = evaluate.gains(evaluate.curve(label, one.probability), depths)
        axes.plot(depths, found, **_line(place))
    first = next(iter(scored.values())).metrics
    axes.plot([0.1], [first.gains[0]], "o", color=MODEL, markersize=5)
    axes.annotate(
        f"best 10% of rows:\n{percent(first.gains[0])} of conversions", (0.1, first.gains[0]),
        (0.16, max(first.gains[0] - 0.13, 0.02)), color=INK, va="center",
    )  # fmt: skip
    _unit_square(axes, "Best-scored share of rows", "Share of all conversions in it")
    return _svg(figure, "gains", f"Cumulative gains. The best tenth holds {percent(first.gains[0])} of conversions.")


def lift(scored: Mapping[str, Scored]) -> str:
    """Conversion by decile of score, in multiples of the average."""
    figure, axes = _figure(4.0)
    first = next(iter(scored.values())).metrics.lift
    others = {place: one.metrics.lift for place, one in enumerate(scored.values()) if place and ranks(one)}
    tops = np.max([first, *others.values()], axis=0)
    width = 0.8 / (1.5 + len(others))
    place = np.arange(1, evaluate.DECILES + 1)
    middle = place - 0.4 + 0.75 * width
    axes.bar(middle, first, width=1.5 * width, color=MODEL)
    for number, (other, heights) in enumerate(others.items(), 1):
        colour = _line(other)["color"]
        axes.bar(middle + (number + 0.25) * width, heights, width=width, color=colour, alpha=0.55)
    for x, height, top in zip(place, first, tops, strict=True):
        axes.annotate(_times(height), (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(1, color=MUTED, linewidth=1, dashes=(3, 3))
    axes.set(xlabel="Tenths of rows, best scores first", ylabel="Times the average rate", xlim=(0.4, 10.6))
    axes.set_ylim(0, 1.12 * max(*tops, 1.0))
    axes.set_xticks(place, [str(number) for number in place])
    axes.grid(visible=False, axis="x")
    shown = ", ".join(f"{height:.2f}" for height in first)
    return _svg(figure, "lift", f"Lift by decile of score, best first: {shown}.")


def ranks(one: Scored) -> bool:
    """Whether rows get different scores: bars of a lift that is 1 everywhere say nothing."""
    return bool(np.ptp(one.metrics.lift) > 1e-6)


def kind(place: int) -> str:
    """Class in the style sheet of the line of the model, place 0, and of each baseline."""
    return "model" if place == 0 else f"b{(place - 1) % len(_LINES) + 1}"


def scores_by_segment(probability: Floats, segment: npt.NDArray[np.int64], cuts: Sequence[float]) -> str:
    """Histogram of the scores on a log-odds scale, coloured by segment; segment: int64[n], places in SEGMENTS."""
    figure, axes = _figure(4.0, left=0.135)
    x = _log_odds(probability)
    low, high = float(x.min()), float(x.max())
    low, high = (low - 0.5, high + 0.5) if high - low < 1e-6 else (low, high)
    edges = np.linspace(low, high, 61)
    counts = [np.histogram(x[segment == place], edges)[0] for place in range(len(SEGMENTS))]
    below = np.zeros(60)
    for place in reversed(range(len(SEGMENTS))):
        axes.stairs(below + counts[place], edges, baseline=below, fill=True, color=SHADES[place])
        below = below + counts[place]
    for cut in cuts:
        if low < (at := float(_log_odds(np.array(cut)))) < high:
            axes.axvline(at, color=MUTED, linewidth=0.8, dashes=(3, 2))
    places = _spread(_CHANCES, _log_odds(np.array(_CHANCES)), low, high, 8)
    if len(places) < 2:
        ends = float(probability.min()), float(probability.max())
        places = list({_mark(end): end for end in ends}.values())
    axes.set_xticks(_log_odds(np.array(places)), [_mark(place) for place in places])
    axes.set(xlabel="Score (stretched at both ends)", ylabel="Rows", xlim=(low, high), ylim=(0, None))
    axes.yaxis.set_major_formatter(lambda value, _: compact(value))
    axes.grid(visible=False, axis="x")
    text = f"Histogram of scores from {percent(float(probability.min()))} to {percent(float(probability.max()))}."
    return _svg(figure, "scores", text)


def rates_by_segment(names: Sequence[str], rows: Floats, positives: Floats, predicted: Floats) -> str:
    """Observed conversion of each segment with its interval, beside what was predicted."""
    figure, axes = _figure(4.0, left=0.27)
    filled = rows > 0
    place = np.arange(len(names))[filled]
    rate = positives[filled] / rows[filled]
    low, high = evaluate.wilson(positives[filled], rows[filled])
    axes.barh(place, rate, height=0.62, color=[SHADES[one] for one in place])
    axes.hlines(place, low, high, color=CARD, linewidth=2.8)
    axes.hlines(place, low, high, color=INK, linewidth=1.2)
    axes.plot(predicted[filled], place, "D", color=CARD, markeredgecolor=INK, markersize=5)
    top = min(1.0, 1.15 * float(max(high.max(), predicted[filled].max())))
    axes.set(xlim=(0, top), ylim=(len(names) - 0.4, -0.6), xlabel="Share that converts")
    axes.set_yticks(np.arange(len(names)), names, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: _mark(value))
    axes.grid(visible=False, axis="y")
    spoken = ", ".join(f"{names[one]} {percent(value)}" for one, value in zip(place, rate, strict=True))
    return _svg(figure, "segments", f"Observed conversion by segment: {spoken}.")


def beeswarm(importance: Importance, columns: Sequence[int]) -> str:
    """One dot a row and feature: how far the feature moved its score, coloured by the feature's value."""
    height = 0.62 + 0.33 * len(columns)
    figure, axes = _figure(height, left=0.03, bottom=0.45 / height, top=1 - 0.12 / height)
    rows = spaced(len(importance.shap), 800)
    effects = importance.shap[rows][:, list(columns)]
    # The farthest thousandth is drawn at the edge.
    reach = max(float(np.quantile(np.abs(effects), 0.999)), 1e-9) * 1.05
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for place, column in enumerate(columns):
        x = np.clip(effects[:, place], -reach, reach)
        values = importance.matrix[rows, column].astype(np.float64)
        missing = np.isnan(values)
        y = place + 0.14 - _swarm(x, reach) * 0.26
        style: dict[str, Any] = {"s": 5, "linewidths": 0, "rasterized": True}
        axes.scatter(x[missing], y[missing], color="#8a94a0", alpha=0.7, **style)
        axes.scatter(x[~missing], y[~missing], c=_LOW_TO_HIGH(_ranks(values[~missing])), alpha=0.85, **style)
        name = f"{place + 1}  {_shorten(importance.names[column], 46)}"
        box = {"facecolor": CARD, "edgecolor": "none", "pad": 0.6}
        axes.text(-reach, place - 0.3, name, fontsize=8.5, va="center", bbox=box)
    axes.set(xlim=(-reach, reach), ylim=(len(columns) - 0.4, -0.6), xlabel="Effect on the score, in log-odds")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    leading = ", ".join(importance.names[column] for column in columns[:3])
    return _svg(
        figure, "shap", f"Effects of the {len(columns)} most used features, most used first: {leading}.", dpi=200
    )


def learning_curve(curves: Mapping[str, Sequence[float]], best_round: int) -> str:
    """Log loss by round of each set of rows, and the round that was kept."""
    figure, axes = _figure(4.0, left=0.15)
    for name, place in curve_places(curves).items():
        axes.plot(np.arange(1, len(curves[name]) + 1), curves[name], **_line(place))
    axes.axvline(best_round, color=MUTED, linewidth=1, dashes=(3, 3))
    axes.set(xlabel="Trees", ylabel="Log loss")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return _svg(figure, "learning", f"Log loss by number of trees; {best_round} trees are kept.")


def groups(label: Labels) -> int:
    """Calibration groups of some eight conversions each: fewer say nothing about a rate."""
    return int(np.clip(np.count_nonzero(label) // 8, 4, evaluate.BINS))


def curve_places(curves: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """Which line each learning curve gets: the last, that of rows not learned from, is the one to look at."""
    return {name: len(curves) - 1 - place for place, name in enumerate(curves)}


def distribution(values: Floats, positive: npt.NDArray[np.bool_], key: str, names: Mapping[float, str]) -> str:
    """Shares of converted rows and of the others by value; values: float64[n], no NaN, n > 0; names: of codes."""
    figure = Figure(figsize=(2.9, 1.35), facecolor="none")
    axes = figure.add_axes((0.05, 0.2, 0.9, 0.76))
    distinct = np.unique(values)
    kinds = distinct if len(distinct) <= 12 else None
    if kinds is not None:
        shown = [names.get(float(kind), compact(float(kind))) for kind in kinds]
        shares = [
            np.array([np.mean(values[side] == kind) if side.any() else 0 for kind in kinds])
            for side in (~positive, positive)
        ]
        place = np.arange(len(kinds))
        axes.bar(place - 0.2, shares[0], 0.4, color=MUTED, alpha=0.45)
        axes.bar(place + 0.2, shares[1], 0.4, color=MODEL)
        room = 44 // len(kinds)
        step = 1 if names else -(-(max(len(text) for text in shown) + 1) // room)
        axes.set_xticks(place[::step], [_shorten(text, max(room * step - 1, 3)) for text in shown[::step]])
        axes.set_xlim(-0.8, len(kinds) - 0.2)
    else:
        warp, places = _scale(values)
        low, high = warp(np.quantile(values, (0.005, 0.995)))
        edges = np.linspace(low, high if high > low else low + 1, 29)
        x = np.clip(warp(values), edges[0], edges[-1])
        for side, colour, alpha in ((~positive, MUTED, 0.35), (positive, MODEL, 0.3)):
            share = np.histogram(x[side], edges)[0] / max(int(side.sum()), 1)
            axes.stairs(share, edges, fill=True, color=colour, alpha=alpha)
            axes.stairs(share, edges, color=colour, linewidth=1)
        ticks = [tick for tick in places if edges[0] <= warp(np.array(tick)) <= edges[-1]]
        axes.set_xticks(warp(np.array(ticks)), [compact(tick) for tick in ticks])
        axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, None)
    axes.set_yticks([])
    axes.tick_params(length=2, labelsize=8)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    return _svg(figure, f"feature-{key}", f"Distribution of {key}, converted rows against the others.")


def _figure(height: float, left: float = 0.145, bottom: float = 0.12, top: float = 0.97) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), facecolor="none")
    return figure, figure.add_axes((left, bottom, 0.955 - left, top - bottom))


def _line(place: int) -> dict[str, Any]:
    """The model is a solid line; baselines are thinner and broken, each in its own way."""
    if place == 0:
        return {"color": MODEL, "linewidth": 2, "zorder": 3}
    colour, dashes = _LINES[(place - 1) % len(_LINES)]
    return {"color": colour, "linewidth": 1.4, "dashes": dashes}


def _unit_square(axes: Axes, x: str, y: str) -> None:
    ticks = np.linspace(0, 1, 6)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.03), xlabel=x, ylabel=y)
    axes.set_xticks(ticks, [_mark(tick) for tick in ticks])
    axes.set_yticks(ticks, [_mark(tick) for tick in ticks])


def _rates(points: Curve) -> tuple[Floats, Floats]:
    """True and false positive rates from (0, 0) on, at no more points than can be seen."""
    hit = np.append(0, points.positives / points.positives[-1])
    negatives = points.rows - points.positives
    wrong = np.append(0, negatives / negatives[-1])
    kept = _thin(hit + wrong)
    return hit[kept], wrong[kept]


def _mark(share: float) -> str:
    return f"{100 * share:.3g}%"


def _times(factor: float) -> str:
    return "0×" if factor == 0 else f"{factor:.1f}×" if factor >= 0.95 else f"{factor:.2f}×"


def _thin(along: Floats, most: int = 300) -> npt.NDArray[np.int64]:
    """Places, first and last among them, at about even distances along a rising coordinate."""
    if len(along) <= most:
        return np.arange(len(along))
    return np.unique(np.append(np.searchsorted(along, np.linspace(along[0], along[-1], most)), len(along) - 1))


def _spread(values: Sequence[float], places: Floats, low: float, high: float, most: int) -> list[float]:
    """Those values whose places lie within [low, high] and are not too near each other for their labels."""
    kept: list[tuple[float, float]] = []
    for value, place in zip(values, places, strict=True):
        if low <= place <= high and (not kept or place - kept[-1][1] >= (high - low) / most):
            kept.append((value, float(place)))
    return [value for value, _ in kept]


def _log_odds(probability: Floats) -> Floats:
    clipped = np.clip(probability, 1e-7, 1 - 1e-7)
    return np.asarray(np.log(clipped / (1 - clipped)))


def _ranks(values: Floats) -> Floats:
    """Shares of values below each, with ties at their middle: colours that one outlier does not squeeze."""
    if len(values) == 0:
        return values
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray(((np.cumsum(counts) - counts / 2) / len(values))[inverse])


def _swarm(x: Floats, reach: float) -> Floats:
    """Offsets in [-1, 1] that set dots of about the same x beside each other, as wide as they are many."""
    column = np.round((x + reach) / (2 * reach) * 120).astype(np.int64)
    order = np.argsort(column, kind="stable")
    _, starts, counts = np.unique(column[order], return_index=True, return_counts=True)
    turn = np.arange(len(x)) - np.repeat(starts, counts)
    side = np.where(turn % 2 == 1, 1, -1) * ((turn + 1) // 2)
    offsets = np.empty(len(x))
    offsets[order] = side / max(float(np.abs(side).max()), 6.0)
    return offsets


def _scale(values: Floats) -> tuple[Callable[[Any], Floats], list[float]]:
    """A stretch of the axis that lets skewed values be seen, and round values to mark on it."""
    low, middle, high = np.quantile(values, (0.005, 0.5, 0.995))
    steps = MaxNLocator(4).tick_values(float(low), float(high))
    if low < 0 or high <= 0 or middle - low > 0.12 * (high - low):
        return np.asarray, [float(step) for step in steps]
    unit = float(np.median(values[values > 0])) / 2
    powers = [0.0, *(10.0**power for power in range(-6, 16) if unit / 3 < 10.0**power <= high)]
    return lambda value: np.arcsinh(np.asarray(value) / unit), powers[:: 1 + len(powers) // 6]


def _shorten(name: str, most: int) -> str:
    if len(name) <= most:
        return name
    tail = (most - 1) // 3
    return f"{name[: most - 1 - tail]}…{name[len(name) - tail :]}"


def _spoken(scored: Mapping[str, Scored], metric: str, title: str) -> str:
    values = ", ".join(f"{name} {getattr(one.metrics, metric):.3f}" for name, one in scored.items())
    return f"{title}: {values}."


def _svg(figure: Figure, key: str, text: str, dpi: int = 100) -> str:
    """The figure as an element of the page; `text` is read to those who do not see it."""
    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(target, format="svg", dpi=dpi, metadata={"Date": None, "Creator": None}, transparent=True)
    drawn = target.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", drawn, flags=re.DOTALL)
    used = set(re.findall(r'url\(#([^)"]+)\)|href="#([^"]+)"', drawn))
    names = {name for pair in used for name in pair}
    drawn = re.sub(r' id="([^"]*)"', lambda one: one[0] if one[1] in names else "", drawn)
    box = re.search(r'viewBox="[^"]*"', drawn)
    if box is None:
        raise RuntimeError("matplotlib wrote an SVG without a viewBox; this is a bug of the report")
    label = html.escape(text, quote=True)
    drawn = re.sub(r"<svg[^>]*>", lambda _: f'<svg {box[0]} role="img" aria-label="{label}">', drawn, count=1)
    drawn = drawn.replace("xlink:href", "href")
    drawn = re.sub(r"font: ?(?:\d+ )?([\d.]+)px[^;\"]*", r"font-size: \1px", drawn)
    drawn = re.sub(r"font-family: ?[^;\"]*;? ?", "", drawn)
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    return re.sub(r">\s+<", "><", drawn).strip()
