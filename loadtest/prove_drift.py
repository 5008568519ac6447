"""How often the drift rules cry wolf, and how soon they see what is wrong: `make drift-proof`.

Prints the tables of docs/drift.md and draws docs/images/drift-alarms.png. Everything is simulated from a seed, with the
formulas of service/core/drift.py and the bins that training makes; a test holds the recording rules to the same
formulas.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from loadtest import machine, prove_drift_shop
from service.core import drift
from service.core.bundle import Bins
from training.reference import bins_of

Values = npt.NDArray[np.float32]
Random = np.random.Generator

SIZES: Final = (100, 200, 500, 1_000, 2_000, 5_000, 10_000)
POPULATION: Final = 200_000
REFERENCE_ROWS: Final = 20_000
PICTURE: Final = Path(__file__).parents[1] / "docs" / "images" / "drift-alarms.png"


@dataclass(frozen=True)
class Feature:
    """A feature of the population: its values, and how they change by half a standard deviation (None: not at all)."""

    name: str
    values: Values
    moved: Values | None
    edges: npt.NDArray[np.float64] | None = None


class Watched(NamedTuple):
    """A feature beside a reference: the bins, and how likely the population is in each, before and after."""

    feature: Feature
    bins: Bins
    critical: float
    chances: npt.NDArray[np.float64]
    moved: npt.NDArray[np.float64] | None


# --- a population of 24 features and a score ---


def population(random: Random) -> list[Feature]:
    """24 features as a shop has them, and the score: numbers, counts with ties, categories, often missing ones."""
    features = [_number(f"number {i}", random.lognormal(0, 0.2 + 0.15 * i, POPULATION)) for i in range(8)]
    counts = [_count(f"count, mean {mean}", mean, random) for mean in (0.03, 0.3, 1, 4, 20)]
    shares = {
        "device": (0.6, 0.3, 0.1),
        "referrer": (0.4, 0.3, 0.2, 0.0999, 0.0001),
        "flag": (0.97, 0.03),
        "country": tuple(1 / (rank + 1) ** 1.6 for rank in range(15)),
    }
    categories = [_category(name, np.array(share) / sum(share), random) for name, share in shares.items()]
    missing = [
        _missing(_number(f"missing {share:.1%}", random.normal(size=POPULATION)), share, random)
        for share in (0.01, 0.01, 0.1, 0.3, 0.5, 0.7, 0.995)
    ]
    return [*features, *counts, *categories, *missing, _number(drift.SCORE, random.beta(1, 12, POPULATION))]


def _number(name: str, values: npt.NDArray[np.float64]) -> Feature:
    return Feature(name, values.astype(np.float32), (values + values.std() / 2).astype(np.float32))


def _count(name: str, mean: float, random: Random) -> Feature:
    """Counts of visitors of different zeal (negative binomial); moved, as many more come as half a deviation."""
    values = random.poisson(random.gamma(0.8, mean / 0.8, POPULATION))
    more = random.poisson(values.std() / 2, POPULATION)
    return Feature(name, values.astype(np.float32), (values + more).astype(np.float32))


def _category(name: str, shares: npt.NDArray[np.float64], random: Random) -> Feature:
    """Codes 0, 1, ...; moved, the share of the first falls by half of the standard deviation of being the first."""
    fewer = shares.copy()
    fewer[0] -= math.sqrt(shares[0] * (1 - shares[0])) / 2
    fewer[1:] *= (1 - fewer[0]) / (1 - shares[0])
    values, moved = (random.choice(len(shares), POPULATION, p=p).astype(np.float32) for p in (shares, fewer))
    return Feature(name, values, moved, np.arange(0.5, len(shares) - 1))


def _missing(feature: Feature, share: float, random: Random) -> Feature:
    gone = random.random(POPULATION) < share
    moved = None if share > 0.9 or feature.moved is None else np.where(gone, np.nan, feature.moved).astype(np.float32)
    return Feature(feature.name, np.where(gone, np.nan, feature.values).astype(np.float32), moved)


def watch(features: Sequence[Feature], random: Random, rows: int = REFERENCE_ROWS) -> list[Watched]:
    """The features beside a reference of some rows drawn from the population, as training makes it."""

    def one(feature: Feature) -> Watched:
        bins = bins_of(random.choice(feature.values, rows), feature.edges)
        moved = None if feature.moved is None else drift.counts_of(feature.moved, bins) / POPULATION
        critical = drift.critical_value(len(bins.shares), len(features))
        return Watched(feature, bins, critical, drift.counts_of(feature.values, bins) / POPULATION, moved)

    return [one(feature) for feature in features]


# --- rules ---


def textbook(counts: npt.NDArray[np.int64], bins: Bins) -> float:
    """PSI as it is usually computed: shares of 0 become 0.0001."""
    seen, reference = (np.maximum(shares, 1e-4) for shares in (counts / counts.sum(), np.array(bins.shares)))
    return float(np.sum((seen - reference) * np.log(seen / reference)))


def drifted(counts: npt.NDArray[np.int64], one: Watched, floor: float, per_visitor: float) -> bool:
    """Whether the drift rule gives an alarm."""
    chance = drift.chance_level(one.critical, counts.sum(), one.bins.rows, per_visitor)
    return drift.psi(counts, one.bins.shares) > chance + floor


def missing(counts: npt.NDArray[np.int64], one: Watched, per_visitor: float) -> bool:
    """Whether the rule of missing features gives an alarm."""
    size = counts.sum()
    return bool(counts[0] / size > drift.missing_threshold(one.bins.shares[0], size, one.bins.rows, per_visitor))


def shipped(counts: npt.NDArray[np.int64], one: Watched, repeats: int) -> bool:
    """Whether any rule of the hour gives an alarm, with the thresholds as they are shipped."""
    floor, least = drift.WINDOWS["1h"]
    per_visitor = max(least, repeats)
    return drifted(counts, one, floor, per_visitor) or missing(counts, one, per_visitor)


Rule = Callable[[npt.NDArray[np.int64], Watched, int], bool]
FLOOR, LEAST = drift.WINDOWS["1h"]
RULES: Final[dict[str, Rule]] = {
    "chance alone": lambda counts, one, _: drifted(counts, one, 0, 1),
    "chance and floor": lambda counts, one, _: drifted(counts, one, FLOOR, 1),
    "k = 5": lambda counts, one, _: drifted(counts, one, FLOOR, LEAST),
    "as shipped": shipped,
    "PSI > 0.1": lambda counts, one, _: textbook(counts, one.bins) > 0.1,
    "PSI > 0.25": lambda counts, one, _: textbook(counts, one.bins) > 0.25,
}


# --- false alarms ---


def hours(features: Sequence[Feature], size: int, count: int, random: Random, repeats: int = 1) -> Iterator[set[str]]:
    """The rules that give an alarm for any feature, for each of `count` hours of `size` scores where nothing changed.

    A hundred hours each share a reference. Every visitor is scored `repeats` times with the same features.
    """
    for _ in range(count // 100):
        drawn = [
            (one, repeats * random.multinomial(size // repeats, one.chances, 100)) for one in watch(features, random)
        ]
        for hour in range(100):
            yield {
                name for name, rule in RULES.items() if any(rule(counts[hour], one, repeats) for one, counts in drawn)
            }


def alarm_rates(
    features: Sequence[Feature], size: int, count: int, random: Random, repeats: int = 1
) -> dict[str, float]:
    """Share of the hours in which each rule gives an alarm."""
    alarms = list(hours(features, size, count, random, repeats))
    return {name: sum(name in alarm for alarm in alarms) / len(alarms) for name in RULES}


# --- power ---


def scores_until_alarm(
    one: Watched, chances: npt.NDArray[np.float64], before: int, step: int, most: int, random: Random, repeats: int = 1
) -> float:
    """Scores after the change until the rules as shipped give an alarm, infinity if `most` are too few.

    The hour holds `before` scores from before the change; the rules are asked after every `step` scores.
    """
    counts = random.multinomial(before, one.chances)
    for size in range(step, most + 1, step):
        counts = counts + repeats * random.multinomial(step // repeats, chances)
        if shipped(counts, one, repeats):
            return size
    return math.inf


def gone(one: Watched) -> npt.NDArray[np.float64]:
    """The chances of the bins once the feature is always missing."""
    chances = np.zeros(len(one.chances))
    chances[0] = 1
    return chances


# --- tables ---


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---:" if place else "---" for place in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _quantiles(found: Sequence[float]) -> str:
    """Median and 95th percentile, counting what was never found as the longest."""
    ordered = sorted(found)
    median, high = ordered[len(ordered) // 2], ordered[math.ceil(0.95 * len(ordered)) - 1]
    return " / ".join("never" if math.isinf(value) else f"{value:,.0f}" for value in (median, high))


def false_alarms(features: Sequence[Feature], count: int, random: Random) -> dict[int, dict[str, float]]:
    """Print and return the share of hours with a false alarm, by the number of scores in the hour."""
    rates = {size: alarm_rates(features, size, count, random) for size in SIZES}
    print(
        f"\n{count:,} hours in which nothing changed, {len(features) - 1} features and the score: those with an alarm\n"
    )
    shown = [name for name in RULES if name != "k = 5"]
    lines = [[f"{size:,}", *(_share(own[name]) for name in shown)] for size, own in rates.items()]
    print(_table(["scores an hour", *shown], lines))
    return rates


def repeated_visitors(features: Sequence[Feature], count: int, random: Random) -> None:
    """Print the same where visitors are scored several times."""
    shown = ("chance alone", "chance and floor", "k = 5", "as shipped")
    lines = []
    for size in (1_000, 10_000):
        for repeats in (1, 2, 5, 10, 20):
            rates = alarm_rates(features, size, count, random, repeats)
            lines.append([f"{size:,}", str(repeats), *(_share(rates[name]) for name in shown)])
    print(f"\nThe same, {count:,} hours, with every visitor scored several times\n")
    print(_table(["scores an hour", "scores a visitor", *shown], lines))


def shifts(watched: Sequence[Watched], count: int, random: Random) -> None:
    """Print after how many scores a shift by half a standard deviation is seen."""
    lines = []
    for one in watched:
        if one.moved is None:
            continue
        cells = [
            _quantiles([scores_until_alarm(one, one.moved, before, 20, 4_000, random, repeats) for _ in range(count)])
            for before, repeats in ((0, 1), (0, 5), (1_000, 1))
        ]
        psi = drift.psi(one.moved * 1e9, one.bins.shares)
        lines.append([one.feature.name, f"{psi:.2f}", *cells])
    print(f"\nScores until a shift by half a standard deviation is seen, median / 95th percentile of {count}\n")
    heads = ["feature", "PSI of the shift", "window begins with it", "five scores a visitor", "after 1,000 others"]
    print(_table(heads, lines))


def broken_trackers(watched: Sequence[Watched], count: int, random: Random) -> None:
    """Print after how many scores it is seen that a feature is always missing."""
    lines = []
    for one in watched:
        if one.feature.name == drift.SCORE:
            continue
        cells = [
            _quantiles([scores_until_alarm(one, gone(one), before, 5, 600, random) for _ in range(count)])
            for before in (0, 500, 2_000)
        ]
        lines.append([one.feature.name, _share(one.bins.shares[0]), *cells])
    print(f"\nScores until a feature that is suddenly always missing is seen, median / 95th percentile of {count}\n")
    print(
        _table(["feature", "missing before", "window begins with it", "after 500 others", "after 2,000 others"], lines)
    )


def quiet_shops() -> None:
    """Print how many hours of simulated shops raise an alarm."""
    print("\nHours with an alarm in simulated shops, scored at every event, where nothing broke\n")
    print(
        _table(
            prove_drift_shop.HEADS, [line for shop in prove_drift_shop.SHOPS for line in prove_drift_shop.lines(shop)]
        )
    )


def draw(rates: dict[int, dict[str, float]], path: Path) -> None:
    """A picture of the share of hours with a false alarm against the scores an hour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), dpi=110)
    colours = {"PSI > 0.1": "#c0392b", "PSI > 0.25": "#e59866", "chance and floor": "#1f618d"}
    for name, colour in colours.items():
        axes.plot(list(rates), [100 * own[name] for own in rates.values()], "o-", color=colour, label=name)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--", label="1 %")
    axes.set(xscale="log", ylim=(-3, 103), xlabel="scores an hour", ylabel="hours with a false alarm, %")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Run everything, print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the hours, no shops and no picture")
    quick = parser.parse_args().quick
    random, begun = np.random.default_rng(20), time.perf_counter()
    features = population(random)
    print(machine.describe())
    rates = false_alarms(features, 100 if quick else 1_000, random)
    repeated_visitors(features, 100 if quick else 500, random)
    watched = watch(features, random)
    shifts(watched, 20 if quick else 200, random)
    broken_trackers(watched, 20 if quick else 200, random)
    if not quick:
        quiet_shops()
        draw(rates, PICTURE)
    print(f"\n{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
