"""What `/metrics` shows, as series with their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import httpx2
from prometheus_client.parser import text_string_to_metric_families


class Scrape(NamedTuple):
    """Families with their types, and samples by their names and labels."""

    types: Mapping[str, str]  # a counter's as its samples are called
    labels: Mapping[str, tuple[str, ...]]  # of the families that have samples, `le` left out
    samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float]

    def value(self, name: str, **labels: str) -> float:
        """The sum of all samples of a name that have these labels."""
        wanted = set(labels.items())
        return sum(value for (found, own), value in self.samples.items() if found == name and wanted <= own)

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """The same for each value of a label."""
        wanted = set(labels.items())
        found: dict[str, float] = {}
        for (one, own), value in self.samples.items():
            if one == name and wanted <= own:
                key = dict(own)[label]
                found[key] = found.get(key, 0) + value
        return found


def scrape(url: str) -> Scrape:
    """Ask a service that runs."""
    return read(httpx2.get(f"{url}/metrics", timeout=20).text)


def read(text: str) -> Scrape:
    """Parse the text format."""
    types: dict[str, str] = {}
    labels: dict[str, tuple[str, ...]] = {}
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        types[name] = family.type
        for sample in family.samples:
            labels[name] = tuple(sorted(label for label in sample.labels if label != "le"))
            samples[sample.name, frozenset(sample.labels.items())] = sample.value
    return Scrape(types, labels, samples)
