"""Progress on the terminal: one bar a stage, on stderr so that results on stdout stay clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Report = Callable[[str, float], None]

console = Console(stderr=True)


@contextmanager
def stages() -> Iterator[Report]:
    """A callback told (stage, share done); each new stage gets a line, which is full when the next one begins.

    Where stderr is no terminal nothing is drawn: a log holds results and errors alone.
    """
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, int] = {}

        def finish() -> None:
            for task in progress.tasks:
                progress.update(task.id, total=1.0, completed=1.0)

        def report(stage: str, share: float) -> None:
            if stage not in tasks:
                finish()
                tasks[stage] = progress.add_task(stage, total=None if share == 0 else 1.0)
            if share > 0:
                progress.update(progress.tasks[list(tasks).index(stage)].id, total=1.0, completed=min(share, 1.0))

        yield report
        finish()
