"""Tensors of the Open Inference Protocol v2, as JSON and in its binary extension.

With the header `Inference-Header-Content-Length: L` the first L bytes of a body are JSON and the tensors whose
parameters say `binary_data_size` follow, in order: FP32 as little-endian bytes, BYTES as a 4-byte little-endian length
before each element. Elements are in row-major order.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError

from service.api.body import decode
from service.core.events import FLOAT32_END
from service.errors import InvalidInference, InvalidRequest, places

Parameters = dict[str, str | float | bool]
HEADER: Final = "Inference-Header-Content-Length"


class InputTensor(BaseModel):
    """One input: `features` FP32 [n, F], or `visitor_id` BYTES [n], whose features are then looked up."""

    name: str
    datatype: str
    shape: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1, max_length=2)]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = Field(None, description="Elements, flat or nested; null is a missing number.")


class RequestedOutput(BaseModel):
    """An output that is wanted; there is `propensity` FP32 [n]."""

    name: str
    parameters: dict[str, Any] = {}


class InferIn(BaseModel):
    """An inference request."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: list[RequestedOutput] | None = None

    @property
    def wants_binary(self) -> bool:
        """Whether the output should be sent in the binary extension."""
        default = self.parameters.get("binary_data_output", False)
        return any(
            output.parameters.get("binary_data", default) is True for output in self.outputs or [_DEFAULT_OUTPUT]
        )


_DEFAULT_OUTPUT: Final = RequestedOutput(name="propensity")


def read(raw: bytes, header_length: str | None) -> tuple[InferIn, bytes]:
    """The request of a body and the binary data behind it. Raises InvalidInference."""
    length = len(raw) if header_length is None else _length(header_length, len(raw))
    try:
        return InferIn.model_validate(decode(raw[:length])), raw[length:]
    except InvalidRequest as error:
        raise InvalidInference(str(error)) from None
    except ValidationError as error:
        raise InvalidInference("; ".join(f"{place.pointer}: {place.message}" for place in places(error)[:3])) from None


def _length(text: str, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and int(text) <= most):
        raise InvalidInference(
            f"{HEADER} must be the number of bytes of JSON that the body of {most} bytes begins with"
        )
    return int(text)


def numbers(tensor: InputTensor, binary: bytes, width: int) -> npt.NDArray[np.float32]:
    """float32[n, width] of an FP32 tensor. Raises InvalidInference."""
    _expect(tensor, "FP32", len(tensor.shape) == 2 and tensor.shape[1] == width, f"[n, {width}]")
    if "binary_data_size" in tensor.parameters:
        blob = _blob(tensor, binary)
        if len(blob) != 4 * math.prod(tensor.shape):
            raise InvalidInference(f"{tensor.name}: shape {tensor.shape} of FP32 is not {len(blob)} bytes")
        return np.frombuffer(blob, "<f4").reshape(tensor.shape).astype(np.float32)
    values = [_number(tensor, value) for value in _elements(tensor)]
    return np.array(values, np.float32).reshape(tensor.shape)


def texts(tensor: InputTensor, binary: bytes) -> list[str]:
    """The n strings of a BYTES tensor of shape [n] or [n, 1]. Raises InvalidInference."""
    _expect(tensor, "BYTES", len(tensor.shape) == 1 or tensor.shape[1] == 1, "[n]")
    if "binary_data_size" not in tensor.parameters:
        values = _elements(tensor)
    else:
        values = list(_split(tensor, _blob(tensor, binary)))
        _expect_count(tensor, len(values))
    if not all(isinstance(value, str) for value in values):
        raise InvalidInference(f"{tensor.name}: every element must be a string in UTF-8")
    return values


def write(
    head: Mapping[str, Any], name: str, values: npt.NDArray[np.float32], binary: bool
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a response with one FP32 output of shape [n]."""
    output: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": [len(values)]}
    if not binary:
        body = json.dumps({**head, "outputs": [{**output, "data": values.tolist()}]}, allow_nan=False).encode()
        return body, {"Content-Type": "application/json"}
    blob = values.astype("<f4").tobytes()
    text = json.dumps({**head, "outputs": [{**output, "parameters": {"binary_data_size": len(blob)}}]}).encode()
    return text + blob, {"Content-Type": "application/octet-stream", HEADER: str(len(text))}


def _expect(tensor: InputTensor, datatype: str, fits: bool, shape: str) -> None:
    if tensor.datatype != datatype or not fits:
        given = f"{tensor.datatype} {tensor.shape}"
        raise InvalidInference(f"{tensor.name}: must be {datatype} {shape}, not {given}")


def _expect_count(tensor: InputTensor, count: int) -> None:
    if count != math.prod(tensor.shape):
        raise InvalidInference(f"{tensor.name}: shape {tensor.shape} does not hold {count} elements")


def _blob(tensor: InputTensor, binary: bytes) -> bytes:
    if tensor.data is not None or tensor.parameters["binary_data_size"] != len(binary):
        raise InvalidInference(
            f"{tensor.name}: binary_data_size must be the {len(binary)} bytes behind the JSON, and no data"
        )
    return binary


def _elements(tensor: InputTensor) -> list[Any]:
    values = list(_flat(tensor.data or []))
    _expect_count(tensor, len(values))
    return values


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value


def _number(tensor: InputTensor, value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= FLOAT32_END:
        raise InvalidInference(f"{tensor.name}: every element must be a number that a float32 can hold, or null")
    return float(value)


def _split(tensor: InputTensor, blob: bytes) -> Iterator[str]:
    place = 0
    while place < len(blob):
        if place + 4 > len(blob) or place + 4 + (size := struct.unpack_from("<I", blob, place)[0]) > len(blob):
            raise InvalidInference(f"{tensor.name}: the data ends inside an element")
        try:
            yield blob[place + 4 : place + 4 + size].decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidInference(f"{tensor.name}: every element must be a string in UTF-8") from None
        place += 4 + size
