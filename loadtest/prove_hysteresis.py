"""What two thresholds and a minimum stay save: `make hysteresis-proof`.

Prints the tables of docs/audiences.md and draws docs/images/hysteresis.png. A month of a hundred thousand simulated
visitors, of whom it is known how likely each really buys: the scores are that and noise, and purchases are drawn from
the truth. Audiences are decided by `audiences.membership`, as a refresh does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from audiences import definitions, membership
from audiences.definitions import Audience
from audiences.population import Population, Said, drawn
from loadtest import machine

DAYS: Final = 30
VISITORS: Final = 100_000
DAY_MS: Final = 86_400_000
FIRST_MS: Final = 1_790_000_000_000
PICTURE: Final = Path(__file__).parents[1] / "docs" / "images" / "hysteresis.png"

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """How much scores tremble, and how much visitors really change; standard deviations on the scale of logits.

    Of what a visitor is beside the usual, nine tenths are left the next day (an AR(1) process).
    """

    noise: float
    change: float
    visitors: int = VISITORS
    seed: int = 7


class Day(NamedTuple):
    """A day: how likely each visitor buys within seven days, who buys on it, and what the model says."""

    truth: Values
    buys: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Course:
    """How an audience fared, a value for each day: entries and exits, members, their truth added up, purchases."""

    audience: Audience
    operations: Values
    members: Values
    truth: Values
    purchases: Values

    @property
    def after_first(self) -> int:
        """Entries and exits after the first day, on which all members have to enter."""
        return int(self.operations[1:].sum())

    @property
    def conversion(self) -> float:
        """Purchases a member and day."""
        return float(self.purchases.sum() / self.members.sum())

    @property
    def true_conversion(self) -> float:
        """What the members' chance of a purchase really was, on average."""
        return float(self.truth.sum() / self.members.sum())


def days(world: World) -> Iterator[Day]:
    """A month of a world."""
    random = np.random.default_rng(world.seed)
    usual = random.normal(-3, 1, world.visitors)
    beside = random.normal(0, 1, world.visitors)
    for _ in range(DAYS):
        logit = usual + world.change * beside
        truth = _probability(logit)
        # The chance of a purchase today, so that seven such days give the truth.
        buys = random.random(world.visitors) < 1 - (1 - truth) ** (1 / 7)
        noise = random.normal(0, world.noise, world.visitors)
        yield Day(truth, buys, _probability(logit + noise).astype(np.float32))
        beside = 0.9 * beside + np.sqrt(1 - 0.9**2) * random.normal(0, 1, world.visitors)


def _probability(logit: Values) -> Values:
    return 1 / (1 + np.exp(-logit))


def run(world: World, audiences: Sequence[Audience]) -> list[Course]:
    """How audiences fare in a world, refreshed once a day."""
    ids = [f"visitor-{place}" for place in range(world.visitors)]
    column, numbers = pa.array(ids, pa.large_string()), drawn(ids)
    state = [membership.nobody(world.visitors) for _ in audiences]
    found = np.zeros((4, len(audiences), DAYS))
    for place, day in enumerate(days(world)):
        said = {"m": Said(day.scores)}
        everyone = Population(column, numbers, np.ones(world.visitors, np.int64), said)
        for which, audience in enumerate(audiences):
            decision = membership.decide(audience, everyone, state[which], FIRST_MS + place * DAY_MS)
            was, now = state[which].entered_ms > 0, decision.entered_ms > 0
            found[:, which, place] = (was != now).sum(), now.sum(), day.truth[now].sum(), day.buys[now].sum()
            state[which] = decision.previous
    return [Course(audience, *found[:, which]) for which, audience in enumerate(audiences)]


def audience(chosen: str, margin: float, min_stay: str = "0") -> Audience:
    """An audience of the model `m`, chosen by `cut: 0.1` or `top: 5000`."""
    text = (
        f"defaults: {{model: m, min_size: 1, margin: {margin}, min_stay: {min_stay}}}\naudiences: {{a: {{{chosen}}}}}"
    )
    return definitions.read(text, "simulated").audiences["a"]


# --- tables ---


def compare(chosen: str, settings: Sequence[tuple[float, str]], worlds: Sequence[World]) -> None:
    """Print how each setting fares in each world beside none."""
    heads = ["noise", "change", "margin", "min_stay", "operations", "fewer", "members", "conversion", "true conversion"]
    lines = []
    for world in worlds:
        plain, *others = run(world, [audience(chosen, 0), *(audience(chosen, *setting) for setting in settings)])
        lines.append([f"{world.noise:g}", f"{world.change:g}", "0", "0", *_cells(plain, plain)])
        for (margin, min_stay), course in zip(settings, others, strict=True):
            lines.append(["", "", f"{margin:g}", min_stay, *_cells(course, plain)])
    print(f"\n`{chosen}`, {worlds[0].visitors:,} visitors, {DAYS} days\n")
    print(_table(heads, lines))


def _cells(course: Course, plain: Course) -> list[str]:
    fewer = f"{plain.after_first / course.after_first:.1f} x" if course.after_first else "all"
    fewer = fewer if course is not plain else ""
    change = f" ({course.conversion / plain.conversion - 1:+.1%})" if course is not plain else ""
    true_change = f" ({course.true_conversion / plain.true_conversion - 1:+.1%})" if course is not plain else ""
    return [
        f"{course.after_first:,}",
        fewer,
        f"{course.members.mean():,.0f}",
        f"{course.conversion:.3%}{change}".replace("%", " %"),
        f"{course.true_conversion:.2%}{true_change}".replace("%", " %"),
    ]


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = " | ".join("---:" for _ in heads)
    return "\n".join([f"| {' | '.join(heads)} |", f"| {rule} |", *(f"| {' | '.join(line)} |" for line in lines)])


def speed() -> None:
    """Print how long a decision about a million visitors takes."""
    visitors = 1_000_000
    begun = time.perf_counter()
    ids = [f"visitor-{place}" for place in range(visitors)]
    column, numbers = pa.array(ids, pa.large_string()), drawn(ids)
    print(f"\nA million visitors: {time.perf_counter() - begun:.2f} s to number them")
    scores = np.random.default_rng(1).beta(1, 15, visitors).astype(np.float32)
    everyone = Population(column, numbers, np.ones(visitors, np.int64), {"m": Said(scores)})
    for chosen in ("cut: 0.1", "top: 5%", "top: 500000, holdout: 10%"):
        one, state = audience(chosen, 0.5, "3d"), membership.nobody(visitors)
        for what in ("first", "again"):
            begun = time.perf_counter()
            state = membership.decide(one, everyone, state, FIRST_MS).previous
            print(f"{chosen}: {time.perf_counter() - begun:.2f} s to decide, {what}")


def draw(path: Path) -> None:
    """A picture of list operations and of conversion, day by day, with and without."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plain, calm = run(World(noise=0.2, change=0), [audience("cut: 0.1", 0), audience("cut: 0.1", 0.5, "3d")])
    figure = Figure(figsize=(8.4, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    along = np.arange(1, DAYS + 1)
    for course, colour, name in ((plain, "#c0392b", "one threshold"), (calm, "#1f618d", "two, and a minimum stay")):
        left.plot(along[1:], course.operations[1:], "o-", color=colour, markersize=3, label=name)
        right.plot(along, 100 * course.truth / course.members, "o-", color=colour, markersize=3, label=name)
    left.set(yscale="log", ylim=(10, 10_000), xlabel="day", ylabel="entries and exits a day")
    right.set(ylim=(0, 22), xlabel="day", ylabel="members who buy within 7 days, %")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Run everything, print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the visitors and no picture")
    quick = parser.parse_args().quick
    begun = time.perf_counter()
    print(machine.describe())
    visitors = VISITORS // 10 if quick else VISITORS
    worlds = [World(noise, change, visitors) for noise, change in ((0.1, 0), (0.2, 0), (0.3, 0), (0.2, 0.3))]
    compare("cut: 0.1", [(0.25, "0"), (0.5, "0"), (0.5, "3d"), (0.75, "3d")], worlds)
    compare(f"top: {visitors // 20}", [(0.5, "0"), (1, "0"), (1, "3d")], worlds)
    speed()
    if not quick:
        draw(PICTURE)
    print(f"\n{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
