"""Owns the dashboards as JSON: what the code makes, and where it is checked in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana import data, model, serving

ROOT: Final = Path(__file__).parents[2]
DIRECTORY: Final = Path(__file__).parent / "dashboards"


def generated() -> dict[Path, str]:
    """The text of every dashboard by the file it belongs in."""
    dashboards = {"serving": serving.build(), "model": model.build(), "data": data.build()}
    return {DIRECTORY / f"{name}.json": _text(dashboard) for name, dashboard in dashboards.items()}


def _text(dashboard: object) -> str:
    plain = in_sight(json.loads(json.dumps(dashboard, cls=JSONEncoder)))
    return json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def in_sight(part: Any) -> Any:
    """Links and annotations above the panels: the library (0.0.21) puts each into a menu, and has no way not to."""
    if isinstance(part, dict):
        kept = {key: value for key, value in part.items() if (key, value) != ("placement", "inControlsMenu")}
        return {key: in_sight(value) for key, value in kept.items()}
    return [in_sight(one) for one in part] if isinstance(part, list) else part
