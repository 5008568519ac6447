"""Writes the dashboards as JSON, for Grafana to load."""

from __future__ import annotations

from deploy.grafana import documents

for path, text in documents.generated().items():
    path.write_text(text, "utf-8")
    print(f"Wrote {path.relative_to(documents.ROOT)}")
