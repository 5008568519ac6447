"""What commands need that serving does not, and what to install where it is missing."""

from __future__ import annotations

import importlib
from typing import Final

from service.core.errors import PropensityError

_EXTRAS: Final = {"training": "the training side", "audiences": "what audiences need"}


def need(*modules: str, extra: str = "training") -> None:
    """Import modules; raises a clear error where the libraries of an extra are not installed."""
    try:
        for module in modules:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise PropensityError(
            f"{error.name} is not installed; install {_EXTRAS[extra]} with pip install 'propensity[{extra}]'"
        ) from None
