"""Reads the table of options of a destination's page."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

DOCS = Path(__file__).parents[2] / "docs" / "destinations"


def options(page: str) -> dict[str, str]:
    """Defaults as the page says them, by option."""
    text = (DOCS / page).read_text("utf-8").partition("\n## Options\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| `?([^`|]*?)`? \|", text, re.MULTILINE))


def defaults(model: type[BaseModel]) -> dict[str, str]:
    """Defaults as the code has them."""
    words = {PydanticUndefined: "required", None: "none"}
    return {name: words.get(one.default, str(one.default)) for name, one in model.model_fields.items()}


def examples(page: str) -> list[str]:
    """The blocks of YAML."""
    return re.findall(r"^```yaml\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
