"""The `propensity` command."""
