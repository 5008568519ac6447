"""Owns what stands beside the service: Prometheus with rules, Alertmanager, Grafana with dashboards."""
