"""What a client asks for: JSON, and behind it the bytes of tensors that are not in the JSON.

Nothing here is sure of what came: RequestError says what is wrong with it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from bireme.errors import RequestError
from bireme.vision.live import Pixels

IMAGES, FILES, LOGITS = "images", "files", "logits"
_DATATYPES = {IMAGES: "FP32", FILES: "BYTES"}
_MOST_JSON = 16 << 20  # bytes: their numbers become objects of Python, of many times the size
_MOST_SMALL_JSON = 64 << 10  # of all but data
_MOST_NUMBER_BYTES = 64  # in JSON, with brackets and indentation
_LENGTH = struct.Struct("<I")
_IS_NESTED = re.compile(rb"\s*\[\s*\[")
_Nested = list[list[list[list[float]]]]


_NONE = msgspec.Raw(b"{}")


class RequestedOutput(msgspec.Struct, frozen=True):
    name: str
    parameters: dict[str, Any] = {}


class _Body(msgspec.Struct, frozen=True):
    """What may be large is decoded once its size is known to be right."""

    inputs: msgspec.Raw
    id: str | None = None
    parameters: msgspec.Raw = _NONE
    outputs: msgspec.Raw = msgspec.Raw(b"[]")


class _Input(msgspec.Struct, frozen=True):
    name: str
    shape: msgspec.Raw
    datatype: str
    parameters: msgspec.Raw = _NONE
    data: msgspec.Raw = msgspec.Raw()


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: list[int]
    parameters: dict[str, Any]
    data: msgspec.Raw


@dataclass(frozen=True)
class Inference:
    """One request. `payload` are the tensor's own bytes; None where its `data` is in the JSON.
    `num_classes`: the best so many as text, in place of logits."""

    id: str | None
    tensor: Tensor
    payload: memoryview | None
    is_binary_wanted: bool
    num_classes: int | None

    @property
    def num_images(self) -> int:
        return self.tensor.shape[0]

    def pixels(self) -> Pixels:
        """Of `images`, in their shape."""
        shape = tuple(self.tensor.shape)
        if self.payload is None:
            images = _numbers(self.tensor.data, shape)
        else:
            images = np.frombuffer(_sized(self.payload, shape), "<f4").reshape(shape)
        if not np.isfinite(images).all():
            raise RequestError(f"{IMAGES} holds NaN, or numbers that are infinite in float32")
        return images

    def files(self) -> list[bytes]:
        """Of `files`, one an image."""
        found: list[bytes]
        if self.payload is None:
            num_texts = bytes(self.tensor.data).count(b'"') // 2  # base64 has none
            _check_not_more(FILES, num_texts, [self.num_images])
            found = _decoded(self.tensor.data, list[bytes], f"{FILES}.data (texts in base64)")
        else:
            found = _elements(self.payload, self.num_images)
        if len(found) != self.num_images:
            raise RequestError(f"{FILES} has {len(found)} elements, its shape {self.num_images}")
        return found


def parse(
    body: bytes, header_length: str | None, side: int, inputs: Mapping[str, Any]
) -> Inference:
    """`header_length` is what Inference-Header-Content-Length says; images are of `side` pixels, and
    `inputs` are those that the model takes."""
    text, rest = _parts(body, header_length)
    asked = _decoded(text, _Body, "the body")
    tensor = _input(asked.inputs, inputs)
    _check_shape(tensor, side)
    parameters = _small(asked.parameters, dict[str, Any], "parameters")
    is_binary = _flag(parameters, "binary_data_output", False)
    num_classes = None
    if outputs := _small(asked.outputs, list[RequestedOutput], "outputs"):
        if len(outputs) > 1 or outputs[0].name != LOGITS:
            names = ", ".join(output.name for output in outputs)
            raise RequestError(f"outputs: {names:.200} is not what there is: {LOGITS}, once")
        wanted = outputs[0].parameters
        is_binary = _flag(wanted, "binary_data", is_binary)
        num_classes = _number(wanted, "classification", least=1)
        _check_not_shared(wanted)
    return Inference(asked.id, tensor, _payload(tensor, rest), is_binary, num_classes)


def _parts(body: bytes, header_length: str | None) -> tuple[memoryview, memoryview]:
    whole, length = memoryview(body), len(body)
    if header_length is not None:
        is_number = header_length.isascii() and header_length.isdigit() and len(header_length) < 19
        if not is_number or int(header_length) > length:
            raise RequestError(
                f"Inference-Header-Content-Length {header_length:.30} must be the bytes of JSON at "
                f"the beginning of the body, which has {length}"
            )
        length = int(header_length)
    if length > _MOST_JSON:
        raise RequestError(
            f"{length} bytes of JSON are too many; send at most {_MOST_JSON}, or tensors as binary data"
        )
    return whole[:length], whole[length:]


def _decoded(data: Any, kind: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError) as error:  # msgspec's own are ValueErrors
        raise RequestError(f"{what} is not as it must be: {error}") from None


def _small(data: msgspec.Raw, kind: Any, what: str) -> Any:
    if len(data) > _MOST_SMALL_JSON:
        raise RequestError(
            f"{what} has {len(data)} bytes of JSON; at most {_MOST_SMALL_JSON} are taken"
        )
    return _decoded(data, kind, what)


def _input(given: msgspec.Raw, inputs: Mapping[str, Any]) -> Tensor:
    known = " or ".join(inputs)
    found = _decoded(given, list[msgspec.Raw], "inputs")
    if len(found) != 1:
        raise RequestError(f"{len(found)} inputs were given; one is needed, {known}")
    tensor = _decoded(found[0], _Input, "inputs[0]")
    if tensor.name not in inputs:
        raise RequestError(f"there is no input {tensor.name!r:.200}; give {known}")
    if tensor.datatype != (datatype := _DATATYPES[tensor.name]):
        raise RequestError(f"{tensor.name} must be {datatype}, not {tensor.datatype:.30}")
    shape = _small(tensor.shape, list[int], f"{tensor.name}.shape")
    parameters = _small(tensor.parameters, dict[str, Any], f"{tensor.name}.parameters")
    return Tensor(tensor.name, shape, parameters, tensor.data)


def _check_shape(tensor: Tensor, side: int) -> None:
    right = [3, side, side] if tensor.name == IMAGES else []
    shape = tensor.shape
    if not shape or shape[1:] != right or shape[0] < 1:
        needed = ", ".join(["N", *map(str, right)])
        raise RequestError(
            f"{tensor.name} has the shape {shape!s:.80}; [{needed}] is needed, with N at least 1"
        )


def _payload(tensor: Tensor, rest: memoryview) -> memoryview | None:
    _check_not_shared(tensor.parameters)
    size = _number(tensor.parameters, "binary_data_size", least=0)
    if (size is None) == (not tensor.data):
        raise RequestError(
            f"{tensor.name} needs either data, or its binary_data_size and the bytes"
        )
    if len(rest) != (size or 0):
        raise RequestError(
            f"{len(rest)} bytes follow the JSON, but binary_data_size is {size or 'not given'}"
        )
    return None if size is None else rest


def _check_not_shared(parameters: Mapping[str, Any]) -> None:
    if "shared_memory_region" in parameters:
        raise RequestError("shared_memory_region is not supported; send tensors in the body")


def _number(parameters: Mapping[str, Any], name: str, least: int) -> int | None:
    value = parameters.get(name)
    if value is not None and (type(value) is not int or value < least):
        raise RequestError(f"{name}={value!r:.30} must be a whole number, at least {least}")
    return value


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"{name}={value!r:.30} must be true or false")
    return value


def _numbers(data: msgspec.Raw, shape: tuple[int, ...]) -> Pixels:
    """Flat, or nested as the shape is."""
    most = _MOST_NUMBER_BYTES * (math.prod(shape) + 256)
    if len(data) > most:
        raise RequestError(
            f"{IMAGES}.data has {len(data)} bytes for the shape {list(shape)}; at most {most} are taken"
        )
    _check_not_more(IMAGES, bytes(data).count(b",") + 1, shape)
    is_nested = _IS_NESTED.match(data) is not None
    values = _decoded(data, _Nested if is_nested else list[float], f"{IMAGES}.data")
    try:
        with np.errstate(over="ignore"):  # what is too large is told with what is infinite
            found = np.array(values, np.float32)
    except ValueError:
        raise RequestError(f"{IMAGES}.data is nested unevenly") from None
    if found.shape != (shape if is_nested else (math.prod(shape),)):
        raise RequestError(f"{IMAGES}.data has the shape {list(found.shape)}, not {list(shape)}")
    return found.reshape(shape)


def _check_not_more(name: str, num_elements: int, shape: Sequence[int]) -> None:
    """Before they become objects of Python, of many times the size."""
    if num_elements > (most := math.prod(shape)):
        raise RequestError(
            f"{name}.data has {num_elements} elements; its shape {list(shape)} has {most}"
        )


def _sized(payload: memoryview, shape: tuple[int, ...]) -> memoryview:
    if len(payload) != (needed := 4 * math.prod(shape)):
        raise RequestError(
            f"{IMAGES} of the shape {list(shape)} are {needed} bytes, not {len(payload)}"
        )
    return payload


def _elements(payload: memoryview, most: int) -> list[bytes]:
    """Each has its length before it; one more than `most` is enough to be refused."""
    found: list[bytes] = []
    at = 0
    while at < len(payload) and len(found) <= most:
        start = at + _LENGTH.size
        if start > len(payload):
            raise RequestError(f"{FILES} ends amid the length of element {len(found)}")
        at = start + _LENGTH.unpack_from(payload, at)[0]
        if at > len(payload):
            raise RequestError(f"{FILES} ends amid element {len(found)}")
        found.append(bytes(payload[start:at]))
    return found
