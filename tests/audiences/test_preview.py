"""Previews: the same numbers as a refresh, and a picture that is one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from audiences import definitions, population, preview, refresh
from audiences.definitions import InvalidDefinitions
from audiences.preview import Preview
from tests.audiences.conftest import AT_MS, WriteScores
from tests.audiences.lists import Lists, Scores

pytestmark = pytest.mark.anyio

TEXT = """
defaults: {model: shop, margin: 0.2, min_size: 3}
audiences:
  best: {top: 20%}
  likely: {cut: 0.5, holdout: 20%}
  tiny: {cut: 0.99}
  anybody: {last_event: {within: 1d}, model: }
"""


class Case:
    def __init__(self, write: WriteScores, artifacts: Path) -> None:
        self.scores = {f"visitor {place}": place / 200 for place in range(200)}
        self.snapshots = [population.open_snapshot(write("shop", self.scores))]
        self.bundles = population.bundles_of(self.snapshots, artifacts)
        self.read = definitions.read(TEXT.replace(", model: }", "}"), "test.yaml")
        self.lists, self.kept = Lists(), Scores()

    async def preview(self, name: str) -> Preview:
        return await preview.preview(self.read, name, self.snapshots, self.bundles, self.lists, self.kept, AT_MS)


@pytest.fixture
def case(write_scores: WriteScores, two_models: Path) -> Case:
    return Case(write_scores, two_models)


async def test_a_preview_is_what_a_refresh_would_do_and_writes_nothing(case: Case) -> None:
    shown = {name: await case.preview(name) for name in case.read.audiences}
    assert json.dumps([case.lists.members, case.kept.places]) == "[{}, {}]"
    done = await refresh.refresh(case.read, case.snapshots, case.bundles, case.lists, case.kept, AT_MS)
    for found in done.audiences:
        assert shown[found.audience.name].found == found or found.cut_off != found.cut_off
        assert shown[found.audience.name].found.members == found.members
    again = await case.preview("best")
    assert (again.before, again.found.entered, again.found.left) == (40, 0, {})


async def test_who_was_erased_after_the_scores_were_made_is_not_counted(case: Case) -> None:
    case.lists.gone = {f"visitor {place}" for place in range(150, 200)}
    shown = await case.preview("best")
    assert (shown.visitors, shown.found.members, len(shown.chosen.ids)) == (150, 30, 30)
    assert not case.lists.gone & set(shown.chosen.ids)
    done = await refresh.refresh(case.read, case.snapshots, case.bundles, case.lists, case.kept, AT_MS)
    assert shown.found in done.audiences
    assert set(shown.chosen.ids) == set(case.lists.members["best"])


async def test_size_expectation_and_overlap_are_those_of_the_members(case: Case) -> None:
    found = await case.preview("likely")
    members = found.found.members
    assert members + found.found.control == 100
    assert found.visitors == 200
    assert found.expected is not None
    assert found.control_expected is not None
    total = found.expected.conversions + found.control_expected.conversions
    assert total == pytest.approx(sum(score for score in case.scores.values() if score >= 0.5), rel=1e-5)
    assert found.expected.low < found.expected.conversions < found.expected.high
    assert found.thresholds is not None
    assert found.thresholds[0] < 0.5 < found.thresholds[1]
    assert found.histogram is not None
    assert (found.histogram.everyone.sum(), found.histogram.members.sum()) == (200, members)
    best = next(one for one in found.overlaps if one.name == "best")
    assert best.size == 40
    assert 0 < best.both < 40, "some of the best are held out of the likely"
    assert [one.name for one in found.overlaps][:2] == ["anybody", "best"]


async def test_an_audience_that_is_not_there_is_told(case: Case) -> None:
    with pytest.raises(InvalidDefinitions, match="no audience 'bset'; did you mean 'best'?"):
        await case.preview("bset")


@pytest.mark.parametrize("name", ["likely", "best", "tiny", "anybody"])
async def test_a_preview_is_drawn(case: Case, tmp_path: Path, name: str) -> None:
    found = await case.preview(name)
    preview.plot(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    preview.plot(found, tmp_path / "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text("utf-8")
    assert name in preview.title(found)


def test_a_histogram_counts_everyone() -> None:
    random = np.random.default_rng(1)
    scores = random.beta(1, 15, 1000).astype(np.float32)
    found = preview.histogram(scores, scores[:10])
    assert (found.everyone.sum(), found.members.sum()) == (1000, 10)
    assert len(found.edges) == preview.BINS + 1
    nobody = preview.histogram(scores[:0], scores[:0])
    assert nobody.everyone.sum() == 0
