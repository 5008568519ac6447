"""Owns the dashboards: what they show, the JSON that Grafana loads, and a preview drawn without Grafana."""
