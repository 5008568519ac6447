"""What training found, as a person wants to read it on a terminal."""

from __future__ import annotations

from typing import Final

from rich.markup import escape
from rich.table import Table

from cli.progress import console
from training.evaluate import Metrics
from training.train import Trained

SHORT: Final = {"recency, frequency, monetary": "RFM regression"}


def print_trained(trained: Trained) -> None:
    """Metrics beside the baselines, then every warning, then where the bundle is and what to do next."""
    model, split = trained.bundle, trained.split.how
    table = Table(title=f"{model.name} {model.version}, judged on rows kept out (split {split})")
    for heading in ("", "ROC-AUC", "AP", "log loss", "Brier", "ECE", "lift"):
        table.add_column(heading, justify="left" if not heading else "right")
    judgement = trained.judgement
    for name, metrics in {"model": judgement.metrics, **judgement.baselines}.items():
        table.add_row(SHORT.get(name, name), *_cells(metrics))
    table.caption = "AP: average precision. ECE: expected calibration error. lift: of the best tenth."
    console.print(table)
    for leak in judgement.leaks:
        console.print(f"[bold yellow]Leak?[/] {escape(leak.message)}", highlight=False)
    for note in trained.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}")
    if joined := trained.data.get("joined", 0):
        console.print(f"{joined:,} anonymous visitors were joined into whom they logged in as")
    bad = trained.data.get("bad", 0)
    if bad:
        examples = escape("; ".join(trained.data["examples"]))
        console.print(f"[yellow]{bad:,} bad rows were left out[/], for example {examples}")
    for name in trained.data.get("missing", ()):
        console.print(f"[yellow]Note:[/] the files have no {escape(name)}; the features that use it are empty")
    path = escape(str(trained.bundle.path))
    console.print(f"Bundle: {path}\nReport: {path}/report.html", soft_wrap=True)


def _cells(metrics: Metrics) -> list[str]:
    return [
        f"{metrics.roc_auc:.3f}",
        f"{metrics.average_precision:.3f}",
        f"{metrics.log_loss:.4f}",
        f"{metrics.brier:.4f}",
        f"{metrics.calibration_error:.4f}",
        f"{metrics.lift[0]:.1f}x",
    ]
