"""The commands of audiences as a person types them, over the embedded feature cache."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from audiences.destinations import registry
from files import snapshots
from service.embedded import EmbeddedServer
from tests.audiences.conftest import AT_MS, WriteScores, two_models, write_scores
from tests.cli.test_commands import Run, in_a_process, run, without

__all__ = ["run", "two_models", "write_scores"]  # fixtures

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "audiences.yaml"
TEXT = """
defaults: {model: shop, margin: 0.2, min_size: 3, purpose: ads}
audiences:
  best: {top: 20%, destinations: google}
  mobile: {cut: 0.5, where: {device: mobile}, holdout: 20%}
  tiny: {cut: 0.999}
"""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, embedded_server: EmbeddedServer, tmp_path: Path) -> None:
    """An empty feature cache, which the commands find by their settings."""
    pytest.importorskip("service.members")
    monkeypatch.setenv("PROPENSITY_REDIS_URL", embedded_server.url)
    monkeypatch.setenv("PROPENSITY_NAMESPACE", f"test-{tmp_path.name}"[:30])


def scores(count: int = 100, shift: float = 0.0) -> dict[str, float]:
    return {f"visitor-{place}": min(1.0, max(0.0, place / count + shift)) for place in range(count)}


def cells(out: str, first: str) -> list[str]:
    """The cells of the line of a table that begins with a word."""
    line = next(line for line in out.splitlines() if line.startswith(f"│ {first} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_audiences_are_listed_without_a_feature_cache(run: Run) -> None:
    done = run("audiences", "list", "--definitions", EXAMPLE, "--no-sizes")
    assert done.status == 0
    for name in ("champions", "cart_abandoners", "no_bids"):
        assert name in done.out
    assert "--features carts_7d,device,purchases_7d,purchases_90d,views_7d" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list"], "audiences.yaml: no such file; give the definitions with --definitions FILE"),
        (["list", "--definitions", "bad.yaml"], "bad.yaml:2: audiences.a.segmnt: unknown key; did you mean 'segment'?"),
        (["preview"], "Missing argument 'name'. See propensity audiences preview --help"),
        (["preview", "best"], "Missing option '--scores'. See propensity audiences preview --help"),
        (["refresh"], "Missing option '--scores'. See propensity audiences refresh --help"),
        (["refresh", "--scores", "x", "--definitions", "good.yaml"], "x: holds no part-*.parquet; give a"),
        (["preview", "best", "--scores", "x", "--definitions", "good.yaml", "--plot", "p.gif"], "p.gif: cannot draw"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_arguments_are_told_in_one_line(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "bad.yaml").write_text("audiences:\n  a: {segmnt: x}\n")
    (tmp_path / "good.yaml").write_text(TEXT)
    assert run("audiences", *arguments).complaint.startswith(said)


def test_without_what_audiences_need_it_is_said_what_to_install(tmp_path: Path) -> None:
    told = in_a_process(
        *("audiences", "list", "--definitions", EXAMPLE), cwd=tmp_path, PYTHONPATH=without(tmp_path, "pyarrow")
    ).complaint
    assert told == "pyarrow is not installed; install what audiences need with pip install 'propensity[audiences]'"


@pytest.mark.usefixtures("cache")
def test_a_preview_a_refresh_and_a_list_agree(
    run: Run, tmp_path: Path, two_models: Path, write_scores: WriteScores
) -> None:
    (tmp_path / "audiences.yaml").write_text(TEXT)
    device = [place % 2 for place in range(100)]
    first = write_scores("first", scores(), features={"device": device})
    options = ("--scores", first, "--artifacts", two_models)
    shown = run("audiences", "preview", "best", *options, "--plot", "best.png")
    assert shown.status == 0, shown
    assert "20 (20.0% of 100 visitors)" in shown.out
    assert "20 enter, 0 leave; it had 0" in shown.out
    assert "there is no ledger at sqlite:///.propensity/ledger.db, so nothing is known to have been sent" in shown.err
    assert "what would be sent to google is not known: destinations.yaml: no such file" in shown.err
    assert not (tmp_path / ".propensity").exists()
    (tmp_path / "destinations.yaml").write_text("destinations: {google: {kind: files, url: lists, purpose: ads}}")
    assert (tmp_path / "best.png").read_bytes().startswith(b"\x89PNG")
    done = run("audiences", "refresh", *options)
    assert done.status == 0, done
    assert "100 new" in done.out
    assert "tiny is empty: fewer than min_size, 3, qualify" in done.err
    listed = run("audiences", "list")
    assert " 20 " in next(line for line in listed.out.splitlines() if "best" in line)
    again = run("audiences", "preview", "best", *options)
    assert "0 enter, 0 leave; it had 20" in again.out
    assert not again.err.count("is not known")
    assert cells(again.out, "google") == ["google", "never", "0", "0", "0", "0", "0", "0", "20"], "nobody agreed"
    small = run("audiences", "preview", "tiny", *options)
    assert "3: only 0 qualify, so nobody is a member" in small.out
    held = run("audiences", "preview", "mobile", *options)
    assert "20 %," in held.out


@pytest.mark.usefixtures("cache")
def test_a_preview_reads_the_file_of_destinations_once(
    run: Run, tmp_path: Path, two_models: Path, write_scores: WriteScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "defaults: {model: shop, min_size: 3, purpose: ads}\naudiences: {best: {top: 20%, destinations: [a, b, c]}}"
    (tmp_path / "audiences.yaml").write_text(text)
    options = "{kind: files, url: lists, purpose: ads}"
    (tmp_path / "destinations.yaml").write_text(f"destinations: {{a: {options}, b: {options}, c: {options}}}")
    load = Mock(wraps=registry.load)
    monkeypatch.setattr(registry, "load", load)
    shown = run("audiences", "preview", "best", "--scores", write_scores("first", scores()), "--artifacts", two_models)
    assert [cells(shown.out, name)[:2] for name in "abc"] == [[name, "never"] for name in "abc"]
    load.assert_called_once_with(Path("destinations.yaml"))


@pytest.mark.usefixtures("cache")
def test_scores_are_read_from_an_object_store(
    run: Run, tmp_path: Path, two_models: Path, write_scores: WriteScores
) -> None:
    (tmp_path / "audiences.yaml").write_text("defaults: {model: shop, min_size: 3}\naudiences: {best: {top: 20%}}")
    url = f"memory://{tmp_path.name}/scores"
    with snapshots.assembling(url) as directory:
        for part in write_scores("here", scores()).iterdir():
            part.rename(directory / part.name)
    options = ("--scores", url, "--artifacts", two_models)
    assert "20 enter, 0 leave; it had 0" in run("audiences", "preview", "best", *options).out
    refreshed = run("audiences", "refresh", *options).out
    assert "100 new" in refreshed
    assert "1 audience as of 2026-09-21" in refreshed
    assert run("audiences", "export", "--bids", url, "--out", "bids.csv").status == 0
    told = run("audiences", "refresh", "--scores", f"{url}/none", "--artifacts", two_models).complaint
    assert told.startswith(f"{url}/none: holds no part-*.parquet; give ")


@pytest.mark.usefixtures("cache")
def test_older_scores_are_told_in_one_line(
    run: Run, tmp_path: Path, two_models: Path, write_scores: WriteScores
) -> None:
    (tmp_path / "audiences.yaml").write_text("defaults: {model: shop}\naudiences: {best: {top: 20%}}")
    new, old = write_scores("new", scores()), write_scores("old", scores(), at_ms=AT_MS - 1000)
    assert run("audiences", "refresh", "--scores", new, "--artifacts", two_models).status == 0
    told = run("audiences", "refresh", "--scores", old, "--artifacts", two_models).complaint
    assert told.startswith(
        "the scores are of 2026-09-21T14:13:19Z, and best was refreshed with scores of 2026-09-21T14:13:2"
    )


@pytest.mark.usefixtures("cache")
def test_scores_of_a_moment_far_ahead_are_refused_since_no_later_ones_would_count(
    run: Run, tmp_path: Path, two_models: Path, write_scores: WriteScores
) -> None:
    (tmp_path / "audiences.yaml").write_text("defaults: {model: shop}\naudiences: {best: {top: 20%}}")
    early = write_scores("early", scores(), at_ms=4_000_000_000_000)
    told = run("audiences", "refresh", "--scores", early, "--artifacts", two_models).complaint
    assert told.startswith("the scores are of 2096-10-02T07:06:40Z, and older ones would be refused until then; score")
    assert run("audiences", "refresh", "--scores", write_scores("now", scores()), "--artifacts", two_models).status == 0
