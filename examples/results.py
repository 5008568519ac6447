"""Runs every example on its real data with the shipped commands, and writes what came out to docs/results.md.

    .venv/bin/python examples/results.py DATA_DIRECTORY [EXAMPLE ...]

The data sets are not part of the project; examples/README.md says where they come from. Tables are small, so they are
trained with five seeds, that is five random splits, and the means are shown; events are split by time, once.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import yaml

from training import specfile

ROOT: Final = Path(__file__).parents[1]
PROPENSITY: Final = [sys.executable, "-m", "cli.main"]
SEEDS: Final = 5


@dataclass(frozen=True)
class Example:
    """A spec of this directory and the files it is for. `leak` is let in by a line of YAML, to see it named."""

    title: str
    spec: str
    files: tuple[str, ...]
    visitors: tuple[str, ...]
    is_table: bool = False
    leak: tuple[str, str] | None = None


EXAMPLES: Final = (
    Example(
        "Online Retail II: buys again within 30 days",
        "online_retail.yaml",
        ("online_retail_2009_2010.parquet",),
        ("13085", "18102", "nobody"),
    ),
    Example(
        "The Complete Journey: redeems a coupon within 45 days of a campaign",
        "complete_journey.yaml",
        (
            "complete_journey_transactions.csv.gz",
            "complete_journey_campaigns.csv",
            "complete_journey_coupon_redemptions.csv",
            "complete_journey_demographics.csv",
        ),
        ("1029", "2261", "nobody"),
    ),
    Example("CDNOW: orders again within 90 days", "cdnow.yaml", ("cdnow_master.csv.gz",), ("00001", "00002", "nobody")),
    Example(
        "E-shop clothing: the visit reaches the sale category",
        "eshop_clothing.yaml",
        ("eshop_clothing_2008.csv.gz",),
        ("1", "24026", "nobody"),
    ),
    Example(
        "Online Shoppers: the session ends in revenue",
        "online_shoppers.yaml",
        ("online_shoppers_intention.csv.gz",),
        ("1", "2", "nobody"),
        is_table=True,
        leak=("PageValues", ""),
    ),
    Example(
        "Bank Marketing: subscribes to a deposit (without duration)",
        "bank_marketing.yaml",
        ("bank_additional_full.csv.gz",),
        ("1", "2", "nobody"),
        is_table=True,
        leak=("duration", "  duration: {trait: duration}\n"),
    ),
)


@dataclass(frozen=True)
class Trained:
    """One run of `propensity train`: the bundle's manifest, seconds, and megabytes at the peak."""

    manifest: dict[str, Any]
    seconds: float
    megabytes: float


def train(example: Example, spec: Path, data: Path, artifacts: Path, seed: int = 0) -> Trained:
    """Train once, as a process of its own, so that its time and memory are all of it."""
    files = [str(data / name) for name in example.files]
    source = ["--table", files[0]] if example.is_table else [part for file in files for part in ("--events", file)]
    command = [*PROPENSITY, "train", "--spec", str(spec), *source, "--artifacts", str(artifacts), "--seed", str(seed)]
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{example.spec}: propensity train failed:\n{said}")
    [aliases] = artifacts.glob("*/aliases.json")
    version = json.loads(aliases.read_text())["production"]
    manifest = json.loads((aliases.parent / version / "manifest.json").read_text())
    return Trained(manifest, time.monotonic() - begun, usage.ru_maxrss / 1024)


def moved_to_today(example: Example, directory: Path, last: str) -> Path:
    """The example's spec with its times moved so that the last event, years ago, happens today."""
    document = specfile.load(ROOT / "examples" / example.spec).model_dump(mode="json")
    days = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(last)).days
    for source in document["source"]:
        source["timestamp"] = f"CAST({source['timestamp']} AS TIMESTAMP) + to_days({days})"
    moved = directory / f"today_{example.spec}"
    moved.write_text(yaml.safe_dump(document, sort_keys=False))
    return moved


def serve_and_score(example: Example, data: Path, artifacts: Path, spec: Path) -> list[dict[str, Any]]:
    """Replay the data, start the service, and ask it for the example's visitors with `propensity score`."""
    environment = {**os.environ, "PROPENSITY_DATA_DIR": str(artifacts.parent / "data")}
    files = [str(data / name) for name in example.files]
    source = ["--table", files[0]] if example.is_table else [part for file in files for part in ("--events", file)]
    subprocess.run(
        [*PROPENSITY, "replay", "--spec", str(spec), *source],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = subprocess.Popen(
        [*PROPENSITY, "serve", "--port", str(port), "--artifacts", str(artifacts)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url)
        asked = [*PROPENSITY, "score", *example.visitors, "--url", url]
        answers = subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True)
    finally:
        service.terminate()
        service.wait(30)
    return [json.loads(line) for line in answers.stdout.splitlines()]


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{url} is not ready after 60 s")


def leaks_named(example: Example, data: Path, directory: Path) -> list[str]:
    """The leaks that training names when the example's leak is let in."""
    assert example.leak is not None
    spec = directory / example.spec
    spec.write_text((ROOT / "examples" / example.spec).read_text() + example.leak[1])
    leaks: list[str] = train(example, spec, data, directory / "leaky").manifest["data"]["leaks"]
    return leaks


COLUMNS: Final = {
    "ROC-AUC": ("roc_auc", ".3f"),
    "average precision": ("average_precision", ".3f"),
    "log loss": ("log_loss", ".4f"),
    "Brier": ("brier", ".4f"),
    "calibration error": ("calibration_error", ".4f"),
}


def section(example: Example, data: Path) -> str:
    """The part of the page about one example."""
    with tempfile.TemporaryDirectory(prefix="propensity-") as name:
        directory = Path(name)
        spec = ROOT / "examples" / example.spec
        runs = [
            train(example, spec, data, directory / "artifacts", seed)
            for seed in range(SEEDS if example.is_table else 1)
        ]
        asked = spec if example.is_table else moved_to_today(example, directory, runs[0].manifest["data"]["to"])
        scored = serve_and_score(example, data, directory / "artifacts", asked)
        leaks = leaks_named(example, data, directory) if example.leak else runs[0].manifest["data"]["leaks"]
    facts = runs[0].manifest["data"]
    metrics = [run.manifest["metrics"] for run in runs]
    size = f"{facts['events']:,} events of {facts['visitors']:,} visitors, " if "events" in facts else ""
    lines = [
        f"## {example.title}",
        "",
        f"[`{example.spec}`](../examples/{example.spec}): {size}{facts['training_rows']:,} rows, split {facts['split']}"
        f"{f', mean of {SEEDS} splits' if example.is_table else ''}. "
        f"{metrics[0]['model']['rows']:,} test rows, {metrics[0]['model']['base_rate']:.1%} positive. "
        f"Training took {fmean(run.seconds for run in runs):.0f} s "
        f"and {max(run.megabytes for run in runs):.0f} MB at the peak, from files to bundle.",
        "",
        f"| | {' | '.join(COLUMNS)} | lift, top 10 % |",
        f"| --- |{' ---: |' * (len(COLUMNS) + 1)}",
    ]
    for who in metrics[0]:
        cells = [format(fmean(run[who][key] for run in metrics), shape) for key, shape in COLUMNS.values()]
        lift = fmean(run[who]["lift"][0] for run in metrics)
        lines.append(f"| {who} | {' | '.join(cells)} | {lift:.1f} |")
    about = f"With `{example.leak[0]}` let in, the" if example.leak else "The"
    lines += ["", f"{about} leakage check names: {', '.join(f'`{leak}`' for leak in leaks) or 'nothing'}.", ""]
    lines += ["| visitor | propensity | segment | events | degraded |", "| --- | ---: | --- | ---: | --- |"]
    for answer in scored:
        lines.append(
            f"| {answer['visitor_id']} | {answer['propensity']:.4f} | {answer['segment']} | {answer['events']} "
            f"| {', '.join(answer['degraded']) or 'no'} |"
        )
    return "\n".join(lines) + "\n"


HEAD: Final = """# Results on real data

Made by `make examples` on {date}, on {cores} cores ({machine}, Python {python}). Every example is trained, replayed,
served and scored with the shipped commands. The last rows of each section are answers of the running service; for
these the times of the events are moved, so that the data set ends today and not years ago. Class prior and logistic
regression learn from the same rows as the model; recency, frequency, monetary is a logistic regression on these three
columns alone.
"""


def main(arguments: Sequence[str]) -> None:
    """Write docs/results.md, or print the sections of the named examples alone."""
    if not arguments or not Path(arguments[0]).is_dir():
        raise SystemExit("usage: results.py DATA_DIRECTORY [EXAMPLE ...]; make examples DATA=DIRECTORY")
    data, wanted = Path(arguments[0]).resolve(), set(arguments[1:])
    sections = []
    for example in EXAMPLES:
        if not wanted or example.spec.removesuffix(".yaml") in wanted:
            print(f"{example.title} ...", file=sys.stderr, flush=True)
            sections.append(section(example, data))
            print(sections[-1], flush=True)
    if not wanted:
        head = HEAD.format(
            date=datetime.datetime.now(datetime.UTC).date(),
            cores=os.cpu_count(),
            machine=platform.machine(),
            python=platform.python_version(),
        )
        (ROOT / "docs" / "results.md").write_text("\n".join([head, *sections]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
