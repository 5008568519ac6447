"""The group `propensity audiences`: who belongs to which audience, and what keeps lists elsewhere in step.

Each module of this package adds its commands to the group with `register(group)`, and imports `audiences` inside them.
"""

from __future__ import annotations

import typer

from cli.audiences import definitions, exports, status, sync, triggers

group = typer.Typer(
    name="audiences",
    help="Audiences: who belongs to them, what they look like, and where they are sent.",
    epilog="Begin with: propensity audiences list, preview, refresh, sync - in this order. See docs/audiences.md.",
    invoke_without_command=True,
)


@group.callback()
def alone(context: typer.Context) -> None:
    """Show the help where no command is named."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def register(app: typer.Typer) -> None:
    """Add the group with all of its commands."""
    for module in (definitions, sync, status, triggers, exports):
        module.register(group)
    app.add_typer(group)
