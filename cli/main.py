"""The `propensity` command: every subcommand, and how errors leave it."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from cli import audiences, drift, offline, online, score
from service.core.errors import PropensityError

app = typer.Typer(
    name="propensity",
    help="Real-time propensity scores: from raw events to a trained model to an answer in milliseconds.",
    epilog="Begin with: propensity simulate, train, replay, serve, score - in this order.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
offline.register(app)
online.register(app)
score.register(app)
drift.register(app)
audiences.register(app)


def main() -> None:
    """Run the command; what a person can mend is told in one line, without a traceback, and exits with 2."""
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="propensity", standalone_mode=False)
    except PropensityError as error:
        _fail(str(error))
    except typer.TyperException as error:
        asked = getattr(error, "ctx", None)
        _fail(f"{error.format_message()} See {asked.command_path if asked else 'propensity'} --help")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except RuntimeError as error:
        if str(error) != "Query interrupted":  # DuckDB's for the KeyboardInterrupt of a Ctrl-C
            raise
        status = 130
    sys.exit(status)


def _fail(message: str) -> NoReturn:
    print(f"propensity: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
