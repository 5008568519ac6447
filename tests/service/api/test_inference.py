"""The Open Inference Protocol, spoken by a client that nobody here wrote, and by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from service.app import create_app
from service.core import bundle
from service.core.bundle import Bundle
from tests.conftest import SHOP, MakeSettings, ServiceProcess, WriteBundle

WIDTH = len(SHOP["features"])
HEADER = "Inference-Header-Content-Length"


@pytest.fixture(scope="session")
def model(artifacts: Path) -> Bundle:
    return bundle.load(artifacts / "shop" / "1")


@pytest.fixture
def triton(service: ServiceProcess) -> Iterator[InferenceServerClient]:
    client = InferenceServerClient(service.url.removeprefix("http://"))
    yield client
    client.close()


@pytest.fixture
def rows() -> Any:
    rows = np.random.default_rng(1).normal(size=(7, WIDTH)).astype(np.float32)
    rows[0, 0], rows[1, 1], rows[2, 2] = np.nan, np.inf, 1e-40
    return rows


def features(rows: Any, binary: bool = True) -> InferInput:
    tensor = InferInput("features", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows, binary_data=binary)
    return tensor


def test_the_client_finds_the_server_and_the_model(triton: InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("shop")
    assert triton.is_model_ready("shop", "1")
    assert not triton.is_model_ready("shop", "2")
    assert not triton.is_model_ready("gone")
    assert triton.get_server_metadata()["name"] == "propensity"
    metadata = triton.get_model_metadata("shop")
    assert (metadata["name"], metadata["versions"]) == ("shop", ["1"])
    assert metadata["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, WIDTH]}]
    assert metadata["outputs"] == [{"name": "propensity", "datatype": "FP32", "shape": [-1]}]


def test_the_clients_usual_binary_request_is_answered_exactly(
    triton: InferenceServerClient, model: Bundle, rows: Any
) -> None:
    result = triton.infer("shop", [features(rows)], request_id="r-1")
    np.testing.assert_array_equal(result.as_numpy("propensity"), model.predict(rows))
    answer = result.get_response()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("r-1", "shop", "1")


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_json_and_binary_may_be_mixed(
    triton: InferenceServerClient, model: Bundle, binary_in: bool, binary_out: bool
) -> None:
    rows = np.linspace(-1, 1, 2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    outputs = [InferRequestedOutput("propensity", binary_data=binary_out)]
    result = triton.infer("shop", [features(rows, binary_in)], model_version="1", outputs=outputs)
    np.testing.assert_array_equal(result.as_numpy("propensity"), model.predict(rows))


@pytest.mark.parametrize("binary", [True, False])
def test_visitors_can_be_asked_for_instead_of_features(
    triton: InferenceServerClient, service: ServiceProcess, binary: bool
) -> None:
    event = {"event": "Product Viewed", "userId": "tritön", "messageId": "1"}
    assert httpx2.post(f"{service.url}/v1/events", json=event).status_code == 200
    names = ["nobody", "tritön"]
    tensor = InferInput("visitor_id", [2], "BYTES")
    tensor.set_data_from_numpy(np.array(names, np.object_), binary_data=binary)
    values = triton.infer("shop", [tensor]).as_numpy("propensity")
    batch = httpx2.post(f"{service.url}/v1/score/batch", json={"visitors": [{"visitor_id": name} for name in names]})
    expected = [result["propensity"] for result in batch.json()["results"]]
    # The second is a little older than the first by the time it is asked for again.
    assert values.tolist() == pytest.approx(expected, rel=0.05)
    assert values[1] > values[0]


def test_no_rows_give_no_propensities(triton: InferenceServerClient) -> None:
    result = triton.infer("shop", [features(np.empty((0, WIDTH), np.float32))])
    assert result.as_numpy("propensity").shape == (0,)


def test_the_client_understands_our_errors(triton: InferenceServerClient, rows: Any) -> None:
    with pytest.raises(InferenceServerException, match="there is shop"):
        triton.infer("gone", [features(rows)])
    with pytest.raises(InferenceServerException, match="version '1' only"):
        triton.infer("shop", [features(rows)], model_version="2")
    with pytest.raises(InferenceServerException, match=rf"must be FP32 \[n, {WIDTH}\]"):
        triton.infer("shop", [features(rows[:, 1:])])


def tensor(**members: Any) -> dict[str, Any]:
    return {"name": "features", "datatype": "FP32", "shape": [1, WIDTH], "data": [0.5] * WIDTH, **members}


def test_json_data_may_be_nested_and_null_is_missing(client: TestClient, model: Bundle) -> None:
    row: list[float | None] = [None, *[0.5] * (WIDTH - 1)]
    expected = model.predict(np.array([[np.nan, *[0.5] * (WIDTH - 1)]], np.float32)).tolist()
    for data in (row, [row]):
        response = client.post("/v2/models/shop/infer", json={"inputs": [tensor(data=data)]})
        assert response.json()["outputs"] == [
            {"name": "propensity", "datatype": "FP32", "shape": [1], "data": expected}
        ]


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"inputs": []},
        {"inputs": [tensor(), tensor()]},
        {"inputs": [tensor(name="unheard")]},
        {"inputs": [tensor(datatype="FP64")]},
        {"inputs": [tensor(shape=[WIDTH])]},
        {"inputs": [tensor(shape=[2, WIDTH])]},
        {"inputs": [tensor(shape=[-1, WIDTH])]},
        {"inputs": [tensor(shape=[1.0, WIDTH])]},
        {"inputs": [tensor(shape=[10**30, WIDTH])]},
        {"inputs": [tensor(data=["1"] * WIDTH)]},
        {"inputs": [tensor(data=[True] * WIDTH)]},
        {"inputs": [tensor(data=[1e39] * WIDTH)]},
        {"inputs": [tensor(data=[10**400] * WIDTH)]},
        {"inputs": [tensor(data=None)]},
        {"inputs": [tensor(data={})]},
        {"inputs": [tensor(parameters={"binary_data_size": 0})]},
        {"inputs": [tensor(data=None, parameters={"binary_data_size": 4 * WIDTH})]},
        {"inputs": [tensor(data=None, parameters={"binary_data_size": "x"})]},
        {"inputs": [tensor()], "outputs": [{"name": "unheard"}]},
        {"inputs": [{"name": "visitor_id", "datatype": "BYTES", "shape": [1], "data": [7]}]},
        {"inputs": [{"name": "visitor_id", "datatype": "BYTES", "shape": [1], "data": [""]}]},
        {"inputs": [{"name": "visitor_id", "datatype": "BYTES", "shape": [1], "data": ["x" * 257]}]},
        {"inputs": [{"name": "visitor_id", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "b"]}]},
    ],
)
def test_a_wrong_request_is_an_error_in_the_protocols_form(client: TestClient, request_: dict[str, Any]) -> None:
    response = client.post("/v2/models/shop/infer", json=request_)
    assert response.status_code in (400, 413)
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]


@pytest.mark.parametrize(
    ("name", "datatype", "blob", "length"),
    [
        ("features", "FP32", b"\0" * (4 * WIDTH - 1), None),
        ("features", "FP32", b"\0" * (4 * WIDTH + 4), None),
        ("visitor_id", "BYTES", struct.pack("<I", 2) + b"a", None),
        ("visitor_id", "BYTES", struct.pack("<I", 1) + b"a" + b"\0\0", None),
        ("visitor_id", "BYTES", struct.pack("<I", 1) + b"\xff", None),
        ("visitor_id", "BYTES", b"", None),
        ("features", "FP32", b"\0" * 4 * WIDTH, "-1"),
        ("features", "FP32", b"\0" * 4 * WIDTH, "x"),
        ("features", "FP32", b"\0" * 4 * WIDTH, "99999999"),
        ("features", "FP32", b"\0" * 4 * WIDTH, "9" * 19),
        ("features", "FP32", b"\0" * 4 * WIDTH, "3"),
        ("features", "FP32", b"\0" * 4 * WIDTH, "²"),
    ],
)
def test_wrong_binary_data_is_an_error(
    client: TestClient, name: str, datatype: str, blob: bytes, length: str | None
) -> None:
    shape = [1, WIDTH] if datatype == "FP32" else [1]
    described = {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(blob)}}
    head = json.dumps({"inputs": [described]}).encode()
    headers = {HEADER.encode(): (length or str(len(head))).encode("latin-1")}
    response = client.post("/v2/models/shop/infer", content=head + blob, headers=headers)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]


def test_too_many_rows_are_told_to_come_in_parts(client: TestClient) -> None:
    ids = {"name": "visitor_id", "datatype": "BYTES", "shape": [1001], "data": ["a"] * 1001}
    assert client.post("/v2/models/shop/infer", json={"inputs": [ids]}).status_code == 413


def test_a_server_without_a_model_is_live_and_not_ready(
    tmp_path: Path, make_settings: MakeSettings, store_url: str, write_bundle: WriteBundle
) -> None:
    (write_bundle(tmp_path) / "golden.json").unlink()
    with TestClient(create_app(make_settings(artifacts=tmp_path, redis_url=store_url))) as client:
        assert client.get("/v2/health/live").status_code == 200
        for path in ("/v2/health/ready", "/v2/models/shop/ready", "/v2/models/shop"):
            response = client.get(path)
            assert response.status_code == 503
            assert "golden.json" in response.json()["error"]
        assert client.get("/v2/models/gone/ready").status_code == 404
        assert client.get("/v2/nothing").json() == {"error": "no route /v2/nothing; /docs lists the routes"}
