"""Owns pictures of the dashboards drawn without Grafana: the same queries, the same layout, by matplotlib.

Reads the checked-in JSON and asks a running Prometheus. Not Grafana's own look; each picture says so.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator

from deploy.grafana import prometheus, variables
from deploy.grafana.documents import DIRECTORY, ROOT
from deploy.grafana.prometheus import Series

CELL: Final = (0.62, 0.34)
"""Inches of one cell of Grafana's grid."""
HEAD: Final = 0.8
INK, PAPER, CARD, GREY = "#24292e", "#f4f5f5", "#ffffff", "#8e8e8e"
COLORS: Final = {"green": "#3d9a50", "orange": "#e8862b", "red": "#d8434e", "blue": "#3870c9", "transparent": INK}
LINES: Final = (
    "#3870c9",
    "#e8862b",
    "#3d9a50",
    "#a352cc",
    "#d8434e",
    "#28a3a3",
    "#b8860b",
    "#7a6a53",
    "#555f6b",
    "#c94f8e",
)
LONGEST: Final = 34
"""Letters of a name in a legend."""
Answer = tuple[Mapping[str, Any], list[Series]]
matplotlib.use("Agg")


def main(arguments: Sequence[str]) -> int:
    """Draw every dashboard."""
    parser = argparse.ArgumentParser(prog="make preview", description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="address of Prometheus")
    parser.add_argument("--minutes", type=int, help="how far back to look; as the dashboard says unless given")
    parser.add_argument("--ago", type=float, default=0, help="minutes since the time to look at has ended")
    parser.add_argument("--scrape", type=int, default=15, help="seconds between scrapes")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="directory of the pictures")
    given = parser.parse_args(arguments)
    for path in sorted(DIRECTORY.glob("*.json")):
        dashboard = json.loads(path.read_text("utf-8"))
        end_s = time.time() - 60 * given.ago
        back_s = 60 * given.minutes if given.minutes else variables.seconds(dashboard["time"]["from"])
        window = variables.Window(end_s - back_s, end_s, given.scrape)
        picture = given.out / f"dashboard-{path.stem}.png"
        draw(dashboard, given.prometheus, window).savefig(picture, dpi=72, facecolor=PAPER)
        print(f"Wrote {picture}")
    return 0


def draw(dashboard: Mapping[str, Any], url: str, window: variables.Window) -> Figure:
    """A dashboard with everything chosen, over a window. Raises QueryFailed where Prometheus refuses a query."""
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    width, height = 24 * CELL[0], bottom * CELL[1] + HEAD
    figure = pyplot.figure(figsize=(width, height))
    figure.text(0.012, 1 - 0.32 / height, dashboard["title"], size=17, weight="bold", color=INK, va="center")
    begun, ended = _utc(window.start_s), _utc(window.end_s)
    note = "Preview drawn without Grafana, from the same queries, by deploy/grafana/preview.py"
    figure.text(
        0.012, 1 - 0.66 / height, f"{note}. {begun:%Y-%m-%d %H:%M} to {ended:%H:%M} UTC.", size=10, color="#a33"
    )
    values = variables.chosen(dashboard)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        box = (
            place["x"] / 24,
            1 - (HEAD + (place["y"] + place["h"]) * CELL[1]) / height,
            place["w"] / 24,
            place["h"] * CELL[1] / height,
        )
        if panel["type"] == "row":
            figure.text(0.012, box[1] + box[3] / 3, f"▾ {panel['title']}", size=12, weight="bold", color=INK)
        else:
            _panel(figure, panel, box, list(prometheus.answered(url, panel, values, window)), window)
    return figure


Box = tuple[float, float, float, float]


def _panel(figure: Figure, panel: Mapping[str, Any], box: Box, answers: list[Answer], window: variables.Window) -> None:
    width, height = figure.get_size_inches()
    gap = 0.05
    card = (box[0] + gap / width, box[1] + gap / height, box[2] - 2 * gap / width, box[3] - 2 * gap / height)
    figure.add_axes(card, facecolor=CARD, xticks=[], yticks=[]).spines[:].set_color("#dcdee0")
    left, top = card[0] + 0.1 / width, card[1] + card[3] - 0.17 / height
    letters = int(card[2] * width * 12.5)
    title = textwrap.shorten(panel["title"], letters, placeholder="…")
    figure.text(left, top, title, size=9.5, weight="bold", color=INK, va="center")
    inner = (
        card[0] + 0.72 / width,
        card[1] + 0.72 / height,
        card[2] - 0.9 / width,
        card[3] - 1.1 / height,
    )
    kind = panel["type"]
    if kind == "stat":
        _number(figure, card, panel, answers)
    elif kind == "table":
        _table(figure, card, panel, answers)
    elif kind == "barchart":
        low = (inner[0], inner[1] + 0.35 / height, inner[2], inner[3] - 0.35 / height)
        _bars(figure.add_axes(low, facecolor=CARD), panel, answers)
    else:
        axes = figure.add_axes(inner, facecolor=CARD)
        (_heat_map if kind == "heatmap" else _lines)(axes, panel, answers)
        axes.set_xlim(window.start_s, window.end_s)
        axes.xaxis.set_major_locator(MultipleLocator(60 * max(1, round(window.range_s / 300))))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda moment, _: f"{_utc(moment):%H:%M}"))
    for axes in figure.axes:
        axes.tick_params(labelsize=7.5, colors=INK, length=2)


def _number(figure: Figure, card: Box, panel: Mapping[str, Any], answers: list[Answer]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    series = [one for _, found in answers for one in found if one.points]
    last = series[0].points[-1][1] if series else math.nan
    color = "green"
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is None or last >= step["value"]:
            color = step["color"]
    if series and len(series[0].points) > 1:
        axes = figure.add_axes((card[0], card[1], card[2], card[3] * 0.36))
        axes.set_axis_off()
        values = [value for _, value in series[0].points]
        axes.fill_between(range(len(values)), values, color=COLORS.get(color, color), alpha=0.15, linewidth=0)
        axes.set_ylim(0, (max((v for v in values if not math.isnan(v)), default=0) or 1) * 1.3)
    text = written(last, defaults["unit"], defaults.get("decimals"))
    middle = card[0] + card[2] / 2, card[1] + card[3] * 0.5
    figure.text(*middle, text, size=19, weight="bold", color=COLORS.get(color, color), ha="center", va="center")


def _lines(axes: Axes, panel: Mapping[str, Any], answers: list[Answer]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    custom = defaults["custom"]
    unit = defaults["unit"]
    dashed = [
        re.compile(override["matcher"]["options"].strip("/"))
        for override in panel["fieldConfig"]["overrides"]
        if override["matcher"]["id"] == "byRegexp"
    ]
    named = [(_name(target, one), one) for target, found in answers for one in found]
    plain = [(name, one) for name, one in named if not any(pattern.search(name) for pattern in dashed)]
    colors = {name: LINES[place % len(LINES)] for place, name in enumerate(sorted({name for name, _ in plain}))}
    tops: list[float] = []
    if custom.get("stacking", {}).get("mode") == "normal" and plain:
        moments = sorted({moment for _, one in plain for moment, _ in one.points})
        heights = [[dict(one.points).get(moment, 0.0) for moment in moments] for _, one in plain]
        finite = [[0 if math.isnan(value) else value for value in line] for line in heights]
        tops = [sum(line) for line in zip(*finite, strict=True)]
        fills = [colors[name] for name, _ in plain]
        axes.stackplot(moments, finite, colors=fills, labels=[n for n, _ in plain], alpha=0.75)
    else:
        for name, one in plain:
            x, y = zip(*one.points, strict=True)
            axes.plot(x, y, color=colors[name], linewidth=1.1, label=name, marker="." if len(x) == 1 else None)
    for name, one in named:
        if (name, one) not in plain:
            x, y = zip(*one.points, strict=True)
            axes.plot(x, y, color=GREY, linewidth=1.1, linestyle=(0, (5, 4)), label=name)
    if "thresholdsStyle" in custom:
        for step in defaults["thresholds"]["steps"][1:]:
            axes.axhline(step["value"], color=COLORS[step["color"]], linewidth=1, linestyle=(0, (5, 4)))
    if custom.get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    else:
        values = [value for _, one in named for _, value in one.points if math.isfinite(value)]
        lowest, highest = min(values, default=0), max([*values, *tops], default=0) or 1
        axes.set_ylim(min(-0.02 * highest, 1.05 * lowest), 1.05 * highest)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value, unit)))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.grid(color="#e7e8ea", linewidth=0.6)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Names below the axes: as many as fit into the card, references last, and how many there are beyond them."""
    handles, names = axes.get_legend_handles_labels()
    shown = dict(zip(names, handles, strict=True))
    whole = axes.get_figure(root=True)
    assert whole is not None
    width = axes.get_position().width * whole.get_size_inches()[0]
    height = axes.get_position().height * whole.get_size_inches()[1]
    columns = max(1, int(width * 12 / (min(max((len(name) for name in shown), default=8), LONGEST) + 6)))
    most = columns * (3 if height > 1 else 1)
    kept = list(shown)
    if len(kept) > most:
        kept = [*kept[: most - 2], kept[-1]]
        shown[f"and {len(shown) - len(kept)} more"] = Line2D([], [], alpha=0)
        kept.append(next(reversed(shown)))
    axes.legend(
        [shown[name] for name in kept],
        [textwrap.shorten(name, LONGEST, placeholder="…") for name in kept],
        loc="upper left",
        bbox_to_anchor=(-0.5 / width, -0.22 / height),
        ncol=columns,
        fontsize=7,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.0,
        borderpad=0,
    )


def _heat_map(axes: Axes, panel: Mapping[str, Any], answers: list[Answer]) -> None:
    found = sorted((one for _, series in answers for one in series), key=lambda one: float(one.labels["le"]))
    moments = sorted({moment for one in found for moment, _ in one.points})
    below = [[dict(one.points).get(moment, 0.0) for moment in moments] for one in found]
    counts = [below[0], *([b - a for a, b in zip(low, high, strict=True)] for low, high in pairwise(below))]
    shades = [[math.sqrt(max(value, 0)) or math.nan for value in line] for line in counts]
    axes.pcolormesh(moments, range(len(found)), shades, cmap="Oranges", shading="nearest", vmin=0)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    bounds = [float(one.labels["le"]) for one in found]
    axes.set_yticks([place + 0.5 for place in range(len(bounds))][::2], [written(b, unit) for b in bounds][::2])
    axes.grid(visible=False)


def _bars(axes: Axes, panel: Mapping[str, Any], answers: list[Answer]) -> None:
    steps = {step["id"]: step.get("options", {}) for step in panel["transformations"]}
    order = steps["sortBy"]["sort"][0]["field"]
    by = panel["options"]["xField"]
    names = list(steps["organize"]["renameByName"].values())
    sorted_by = {
        one.labels[by]: float(one.labels[order]) for _, found in answers for one in found if order in one.labels
    }
    places = {label: place for place, label in enumerate(sorted(sorted_by, key=lambda label: sorted_by[label]))}
    for number, ((_, found), name) in enumerate(zip(answers, names, strict=True)):
        shown = [one for one in found if one.labels[by] in places]
        x = [places[one.labels[by]] + 0.4 * number for one in shown]
        color = GREY if number == len(names) - 1 else LINES[number]
        axes.bar(x, [one.points[0][1] for one in shown], 0.38, color=color, label=name)
    axes.set_xticks([place + 0.2 for place in places.values()], list(places), rotation=28, ha="right")
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value, unit)))
    axes.legend(fontsize=7.5, frameon=False, loc="upper right", ncol=2)


def _table(figure: Figure, card: Box, panel: Mapping[str, Any], answers: list[Answer]) -> None:
    (organize,) = [step["options"] for step in panel["transformations"] if step["id"] == "organize"]
    names = list(organize["renameByName"].values())
    units = {
        override["matcher"]["options"]: override["properties"][0]["value"]
        for override in panel["fieldConfig"]["overrides"]
    }
    rows: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for (_, found), name in zip(answers, names, strict=True):
        for one in found:
            labels = tuple(item for item in sorted(one.labels.items()) if item[0] != "__name__")
            rows.setdefault(labels, {})[name] = one.points[0][1]
    by = panel["options"]["sortBy"][0]["displayName"]
    ordered = sorted(rows.items(), key=lambda row: -row[1].get(by, -math.inf))
    width, height = figure.get_size_inches()
    line = 0.21 / height
    most = int((card[3] - 0.45 / height) / line) - 1
    keys = sorted({name for row in rows for name, _ in row})
    columns = [*keys, *names]
    for place, column in enumerate(columns):
        x = card[0] + 0.12 / width + place * (card[2] - 0.2 / width) / len(columns)
        y = card[1] + card[3] - 0.45 / height
        figure.text(x, y, column, size=8, weight="bold", color=INK, va="center")
        for number, (row, values) in enumerate(ordered[:most]):
            own = dict(row)
            text = own.get(column, "") if column in keys else written(values.get(column, math.nan), units[column])
            figure.text(x, y - (number + 1) * line, text, size=8, color=INK, va="center")


def _name(target: Mapping[str, Any], one: Series) -> str:
    legend = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: one.labels.get(found[1], ""), target["legendFormat"])
    return legend.strip() or "value"


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def written(value: float, unit: str, decimals: int | None = None) -> str:
    """A value with its unit, as short as Grafana writes it."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if unit == "percentunit":
        return f"{_short(100 * value, decimals)} %"
    if unit == "s":
        return _duration(value)
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    suffix = {"reqps": " req/s", "cps": " c/s", "ops": " ops/s"}.get(unit, "")
    if unit != "none" and abs(value) >= 10_000:
        return f"{value / 1000:.1f} K{suffix}"
    return _short(value, decimals) + suffix


def _short(value: float, decimals: int | None = None) -> str:
    if decimals is not None:
        return f"{value:.{decimals}f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _duration(seconds: float) -> str:
    for size, name in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if abs(seconds) >= size:
            return f"{_short(seconds / size)} {name}"
    return f"{_short(seconds * 1e6)} µs" if seconds else "0 s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
