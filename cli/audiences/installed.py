"""What the commands of audiences need that serving does not, and what to install where it is missing."""

from __future__ import annotations

import importlib

from service.core.errors import PropensityError


def need(*modules: str) -> None:
    """Import modules; raises a clear error where the libraries for audiences are not installed."""
    try:
        for module in modules:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise PropensityError(
            f"{error.name} is not installed; install what audiences need with pip install 'propensity[audiences]'"
        ) from None
