"""The `propensity` command: every subcommand, and how errors leave it."""

from __future__ import annotations

import sys

import typer

from cli import offline, online
from service.core.errors import PropensityError

app = typer.Typer(
    name="propensity",
    help="Real-time propensity scores: from raw events to a trained model to an answer in milliseconds.",
    epilog="Begin with: propensity simulate, train, replay, serve, score - in this order.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
offline.register(app)
online.register(app)


def main() -> None:
    """Run the command; an error that a person can mend is printed without a traceback and exits with 2."""
    try:
        app()
    except PropensityError as error:
        print(f"propensity: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
