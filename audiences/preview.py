"""Previews: what an audience would look like if it were refreshed now. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from audiences import budget, membership, refresh
from audiences.budget import Expectation
from audiences.definitions import Audience, Definitions, InvalidDefinitions
from audiences.population import Flags, Population, Snapshot
from audiences.refresh import Lists, Refreshed, Scores
from audiences.sent import Chosen, Sent
from audiences.sync import Counts
from service.core.advice import nearest
from service.core.bundle import Bundle
from service.core.spec import format_duration

BINS: Final = 24

_INK, _MUTED, _OTHERS, _MEMBERS = "#1f2733", "#66707f", "#c9d1dc", "#2b6cb0"
_CHANGED, _REMOVED = "#8fb4d9", "#c2673a"
_MOST_BARS: Final = 8


class Histogram(NamedTuple):
    """How many of everyone, and of the members, have scores between edges float64[BINS + 1]; counts int64[BINS]."""

    edges: npt.NDArray[np.float64]
    everyone: npt.NDArray[np.int64]
    members: npt.NDArray[np.int64]


class Overlap(NamedTuple):
    """How many members of this audience are in another one, which has `size`."""

    name: str
    size: int
    both: int


@dataclass(frozen=True)
class Preview:
    """What a person wants to know before an audience is sent anywhere."""

    found: Refreshed
    at_ms: int
    visitors: int
    horizon: str | None
    expected: Expectation | None
    control_expected: Expectation | None
    thresholds: tuple[float, float] | None  # of a cut: to leave below, to enter from
    histogram: Histogram | None
    overlaps: Sequence[Overlap]
    chosen: Chosen
    sent: Sequence[Sent] = ()  # by destination

    @property
    def audience(self) -> Audience:
        """The audience."""
        return self.found.audience

    @property
    def before(self) -> int:
        """How many members there were after the last refresh."""
        return self.found.members - self.found.entered + sum(self.found.left.values())


async def preview(
    definitions: Definitions,
    name: str,
    snapshots: Sequence[Snapshot],
    bundles: Mapping[str, Bundle],
    members: Lists,
    scores: Scores,
    now_ms: int,
    report: refresh.Report = lambda stage, share: None,
) -> Preview:
    """What an audience, and those that it overlaps with, would be at `now_ms`. Raises InvalidDefinitions."""
    if name not in definitions.audiences:
        raise InvalidDefinitions(f"no audience {name!r}{nearest(name, definitions.audiences)}")
    report("Reading scores", 0)
    everyone = await refresh.read(definitions, snapshots, bundles, members)
    for place, model in enumerate(bundles):
        report("Reading segments", place / len(bundles))
        before = await refresh.stored_segments(scores, model, everyone)
        everyone, _ = refresh.moved(definitions, bundles[model], everyone, before, now_ms)
    decided: dict[str, Flags] = {}
    found: Refreshed | None = None
    control = np.zeros(len(everyone), np.bool_)
    described = refresh.described_in(await members.names())
    for place, audience in enumerate(definitions.ordered):
        report("Deciding audiences", place / len(definitions.ordered))
        stored = await refresh.read_stored(members, audience, everyone, described)
        decision = membership.decide(audience, everyone, stored.previous, now_ms)
        everyone = everyone.with_audience(audience.name, decision.qualified)
        decided[audience.name] = decision.entered_ms > 0
        if audience.name == name:
            found, control = refresh.summary(audience, stored, decision), decision.control_ms > 0
    assert found is not None
    own, audience = decided[name], found.audience
    asked = audience.model if audience.model is not None else next(iter(audience.scores), None)
    said = everyone.models[asked].propensity if asked is not None else None
    bundle = bundles[asked] if asked is not None else None
    error = budget.level_error(bundle.manifest.metrics) if bundle is not None else 0.0
    label = bundle.spec.label if bundle is not None else None
    return Preview(
        found=found,
        at_ms=now_ms,
        visitors=len(everyone),
        horizon=format_duration(label.horizon) if label is not None and label.horizon is not None else None,
        expected=budget.expected(said[own], error) if said is not None else None,
        control_expected=budget.expected(said[control], error) if said is not None and control.any() else None,
        thresholds=audience.cut.thresholds(audience.margin or 0.0) if audience.cut is not None else None,
        histogram=histogram(said[~np.isnan(said)], said[own]) if said is not None else None,
        overlaps=overlaps(name, decided),
        chosen=_chosen(everyone, audience, own),
    )


def _chosen(everyone: Population, audience: Audience, own: Flags) -> Chosen:
    ids = everyone.ids.filter(pa.array(own)).to_pylist()
    if audience.model is None:
        return Chosen(ids)
    said = everyone.models[audience.model]
    return Chosen(ids, said.propensity[own], said.segment[own] if said.segment is not None else None)


def histogram(everyone: npt.NDArray[np.float32], members: npt.NDArray[np.float32]) -> Histogram:
    """Scores of everyone and of the members, float32[n] without NaN, in BINS bins of equal width up to the highest."""
    highest = float(everyone.max(initial=0.01))
    edges = np.linspace(0, highest, BINS + 1)
    return Histogram(edges, np.histogram(everyone, edges)[0], np.histogram(members, edges)[0])


def overlaps(name: str, decided: Mapping[str, Flags]) -> list[Overlap]:
    """How much of an audience is in each of the others, most first."""
    own = decided[name]
    found = [Overlap(other, int(of.sum()), int((own & of).sum())) for other, of in decided.items() if other != name]
    return sorted(found, key=lambda one: (-one.both, one.name))


def plot(preview: Preview, path: Path) -> None:
    """Draw a preview into a picture, whose kind is that of the file's name: .png, .svg or .pdf."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.6, 4.4 if not preview.sent else 5.4), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subfigures(1, 2, width_ratios=(3, 2), squeeze=False)[0]
        _draw_scores(left.subplots(), preview)
        if preview.sent:
            above, below = right.subplots(2, 1, height_ratios=(3, 2))
            _draw_sent(below, preview.sent[:_MOST_BARS])
        else:
            above = right.subplots()
        _draw_overlaps(above, preview)
        figure.suptitle(title(preview), x=0.01, ha="left", color=_INK, fontsize=11, fontweight="bold")
        figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)


def title(preview: Preview) -> str:
    """The audience in one line."""
    words = [f"{preview.audience.name}: {preview.found.members:,} of {preview.visitors:,} visitors"]
    if preview.found.too_small:
        words = [f"{preview.audience.name}: empty, fewer than {preview.audience.min_size:,}"]
    elif preview.expected is not None:
        one = preview.expected
        words.append(f"{one.conversions:,.0f} conversions expected ({one.low:,.0f} to {one.high:,.0f})")
    if preview.found.control:
        words.append(f"{preview.found.control:,} held out")
    return ", ".join(words)


def _draw_scores(axes: object, preview: Preview) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    if preview.histogram is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "asks no model", color=_MUTED, ha="center")
        return
    edges, everyone, members = preview.histogram
    axes.stairs(everyone, edges, fill=True, color=_OTHERS, label="everyone")
    axes.stairs(members, edges, fill=True, color=_MEMBERS, label="members")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 2 * max(1, int(everyone.max(initial=1))))
    if preview.thresholds is not None:
        for at, style, said in zip(preview.thresholds, ("--", "-"), ("leave below", "enter from"), strict=True):
            axes.axvline(at, color=_INK, linestyle=style, linewidth=1, label=f"{said} {at:.3f}")
    elif not np.isnan(preview.found.cut_off):
        at = preview.found.cut_off
        axes.axvline(at, color=_INK, linewidth=1, label=f"lowest member {at:.3f}")
    axes.set_xlabel("propensity")
    axes.set_ylabel("visitors")
    axes.legend(frameon=False)


def _draw_overlaps(axes: object, preview: Preview) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    shown = [one for one in preview.overlaps if one.both][:_MOST_BARS]
    axes.set_title("of its members are also in", loc="left", color=_MUTED, fontsize=9)
    if not shown:
        axes.set_axis_off()
        axes.text(0, 0.9, "none of the others", color=_MUTED, transform=axes.transAxes)
        return
    shares = [100 * one.both / max(1, preview.found.members) for one in shown]
    places = np.arange(len(shown))
    axes.barh(places, shares, color=_MEMBERS, height=0.6)
    axes.set_yticks(places, [one.name for one in shown])
    axes.set_ylim(max(len(shown), 4) - 0.5, -0.6)
    axes.set_xlim(0, 118)
    axes.set_xticks([0, 25, 50, 75, 100])
    for place, (share, one) in enumerate(zip(shares, shown, strict=True)):
        axes.text(share + 1.5, place, f"{one.both:,}", va="center", color=_INK)
    axes.set_xlabel("percent")


def _draw_sent(axes: object, sent: Sequence[Sent]) -> None:
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator

    assert isinstance(axes, Axes)
    axes.set_title("since the last synchronisation", loc="left", color=_MUTED, fontsize=9)
    places = np.arange(len(sent))
    counts = [one.next or Counts(one.destination) for one in sent]
    end = np.zeros(len(sent), np.int64)
    for label, color, numbers in (
        ("unchanged", _OTHERS, [one.unchanged for one in counts]),
        ("changed", _CHANGED, [one.added - one.entering for one in counts]),
        ("new", _MEMBERS, [one.entering for one in counts]),
    ):
        axes.barh(places, numbers, left=end, color=color, height=0.5, label=label)
        end += numbers
    removed = max(one.removed for one in counts)
    axes.barh(places, [-one.removed for one in counts], color=_REMOVED, height=0.5, label="to remove")
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_xlim(-1.1 * removed, max(1.6 * end.max(), 0.6 * removed, 1))
    for place, one in enumerate(sent):
        told = f"+{one.next.entering:,}  \N{MINUS SIGN}{one.next.removed:,}" if one.next is not None else "not known"
        axes.text(end[place], place, f" {told}", va="center", color=_INK if one.next is not None else _MUTED)
    axes.set_yticks(places, [one.destination for one in sent])
    axes.set_ylim(max(len(sent), 3) - 0.5, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    axes.legend(
        frameon=False,
        loc="upper right",
        bbox_to_anchor=(1.02, -0.2),
        ncols=4,
        fontsize=8,
        handlelength=1,
        columnspacing=1,
    )
