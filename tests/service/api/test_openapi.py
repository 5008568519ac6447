"""The OpenAPI document, and whether the service does what it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi import checks

from service.app import create_app
from service.settings import Settings
from tests.conftest import ServiceProcess


@pytest.fixture
def document() -> dict[str, Any]:
    return create_app(Settings(_env_file=None)).openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def test_the_routes_are_those_of_the_design(document: dict[str, Any]) -> None:
    assert {name for name, _ in operations(document)} == {
        "POST /v1/score",
        "POST /v1/score/batch",
        "POST /v1/events",
        "GET /v1/visitors/{visitor_id}",
        "DELETE /v1/visitors/{visitor_id}",
        "GET /v1/audiences",
        "GET /v1/audiences/{name}",
        "GET /v1/audiences/{name}/members",
        "GET /v1/audiences/{name}/changes",
        "GET /v1/models",
        "GET /v1/models/{name}",
        "GET /v1/models/{name}/top",
        "GET /v1/models/{name}/visitors",
        "GET /v1/models/{name}/spread",
        "GET /v2",
        "GET /v2/health/live",
        "GET /v2/health/ready",
        "GET /v2/models/{name}",
        "GET /v2/models/{name}/ready",
        "GET /v2/models/{name}/versions/{version}",
        "GET /v2/models/{name}/versions/{version}/ready",
        "POST /v2/models/{name}/infer",
        "POST /v2/models/{name}/versions/{version}/infer",
        "GET /livez",
        "GET /readyz",
        "GET /metrics",
    }


def test_every_operation_is_described_and_its_errors_are_problems(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        assert operation["summary"], name
        assert operation["description"], name
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                expected = "application/json" if "/v2" in name else "application/problem+json"
                assert list(response["content"]) == [expected], (name, status)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from [node["$ref"]] if "$ref" in node else []
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) <= known
    assert not any(name.endswith("HTTPValidationError") for name in known)


@schemathesis.openapi.from_dict(create_app(Settings(_env_file=None)).openapi()).parametrize()
@hypothesis_settings(
    max_examples=25,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_service_does_what_its_document_says(case: schemathesis.Case[Any], service: ServiceProcess) -> None:
    # The document cannot say which features a model has, nor that the items of a list are judged one by one.
    judged_alone: list[CheckFunction] = [checks.positive_data_acceptance, checks.negative_data_rejection]
    routes = ("/v1/score", "/v1/score/batch", "/v1/events")
    case.call_and_validate(
        base_url=service.url, excluded_checks=judged_alone if case.operation.path in routes else None
    )
