"""KServe's requests as they are read and answered, and what is said of those that are wrong."""

from __future__ import annotations

import base64
import json
import struct
import tracemalloc
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bireme.errors import RequestError
from bireme.server.kserve.request import Inference, parse
from bireme.server.kserve.response import respond
from bireme.vision.preprocessing import Preprocessing, decode_image, read_images

SIDE = 2
NUM_VALUES = 3 * SIDE * SIDE  # of an image
INPUTS = {"images": {}, "files": {}}
IMAGES = np.arange(2 * NUM_VALUES, dtype=np.float32).reshape(2, 3, SIDE, SIDE)
LOGITS = np.array([[0.5, -1.0, 2.0], [3.0, 2.5, 1e-9]], np.float32)
LABELS = {0: "cat", 2: "dog: large"}


def read(body: dict[str, Any] | bytes, rest: bytes = b"", length: str | None = None) -> Inference:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    if length is None and rest:
        length = str(len(text))
    return parse(text + rest, length, SIDE, INPUTS)


def images(**more: Any) -> dict[str, Any]:
    """An input of two images in JSON."""
    told = {"name": "images", "datatype": "FP32", "shape": list(IMAGES.shape)}
    return {**told, **({} if "parameters" in more else {"data": IMAGES.ravel().tolist()}), **more}


def binary(size: Any = IMAGES.nbytes, **more: Any) -> dict[str, Any]:
    return {"inputs": [images(parameters={"binary_data_size": size}, **more)]}


def test_data_may_be_flat_nested_or_binary() -> None:
    for asked in (
        read({"inputs": [images()]}),
        read({"inputs": [images(data=IMAGES.tolist())]}),
        read(binary(), IMAGES.tobytes()),
    ):
        assert asked.num_images == 2
        assert asked.pixels().dtype == np.float32
        assert np.array_equal(asked.pixels(), IMAGES)


@given(st.binary(max_size=200), st.one_of(st.none(), st.text(max_size=20), st.integers().map(str)))
def test_whatever_comes_is_refused_in_words(body: bytes, length: str | None) -> None:
    with pytest.raises(RequestError):
        parse(body, length, SIDE, INPUTS).pixels()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["binary_data_size", "classification", "binary_data", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["name", "datatype", "shape", "data", "parameters"]), JSON))
def test_an_input_with_whatever_fields_is_read_or_refused(fields: dict[str, Any]) -> None:
    with suppress(RequestError):
        assert read({"inputs": [{**images(), **fields}]}).pixels().shape == IMAGES.shape


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "the body is not as it must be"),
        (b"[]", "the body is not as it must be: Expected `object`, got `array`"),
        ({}, "missing required field `inputs`"),
        ({"inputs": []}, "0 inputs were given; one is needed, images or files"),
        ({"inputs": [images(), images()]}, "2 inputs were given"),
        ({"inputs": [images(name="x")]}, "there is no input 'x'; give images or files"),
        ({"inputs": [images(datatype="FP64")]}, "images must be FP32, not FP64"),
        ({"inputs": [images(datatype="INT8")]}, "images must be FP32, not INT8"),
        ({"inputs": [images(name="files")]}, "files must be BYTES, not FP32"),
        ({"inputs": [images(shape=[2, 3, 2])]}, r"shape \[2, 3, 2\]; \[N, 3, 2, 2\] is needed"),
        ({"inputs": [images(shape=[2, 3, 2, 3])]}, r"shape \[2, 3, 2, 3\]; \[N, 3, 2, 2\]"),
        ({"inputs": [images(shape=[-2, 3, 2, 2])]}, "with N at least 1"),
        ({"inputs": [images(shape=[0, 3, 2, 2], data=[])]}, "with N at least 1"),
        ({"inputs": [images(shape=[])]}, "with N at least 1"),
        ({"inputs": [images(shape=[2, -3, 2, -2])]}, "is needed"),
        ({"inputs": [images(shape=[1.5, 3, 2, 2])]}, r"images\.shape is .*Expected `int`, got `float`"),
        ({"inputs": [images(shape=[True, 3, 2, 2])]}, "Expected `int`, got `bool`"),
        ({"inputs": [images(shape="2,3,2,2")]}, "Expected `array`, got `str`"),
        ({"inputs": [images(shape=[2**62, 3, 2, 2])]}, r"data has the shape \[24\], not"),
        ({"inputs": [images(shape=[2**70, 3, 2, 2])]}, "shape"),
        ({"inputs": [images(data=[0.0] * 23)]}, r"data has the shape \[23\], not \[2, 3, 2, 2\]"),
        ({"inputs": [images(data=[0.0] * 25)]}, r"has 25 elements; its shape \[2, 3, 2, 2\] has 24"),
        ({"inputs": [images(data=IMAGES.tolist()[:1])]}, r"shape \[1, 3, 2, 2\], not"),
        ({"inputs": [images(data=[[[[0.0]]], [[[0.0, 1.0]]]])]}, "is nested unevenly"),
        ({"inputs": [images(data=[0.0] * 9000)]}, "at most 17920 are taken"),
        ({"inputs": [images(data=[[0.0]])]}, "images.data is not as it must be"),
        ({"inputs": [images(data=["0.5"] * 24)]}, "Expected `float`, got `str`"),
        ({"inputs": [images(data=[None] * 24)]}, "Expected `float`, got `null`"),
        ({"inputs": [images(data=[True] * 24)]}, "Expected `float`, got `bool`"),
        ({"inputs": [images(data=[1e39] * 24)]}, "infinite in float32"),
        ({"inputs": [images(data=[float("nan")] * 24)]}, "the body is not as it must be"),
        ({"inputs": [images(data=[float("inf")] * 24)]}, "the body is not as it must be"),
        ({"inputs": [images(data=[10**400] * 24)]}, "is not as it must be"),
        ({"inputs": [images(data=json.loads("[" * 60 + "]" * 60))]}, "is not as it must be"),
        ({"inputs": [images(parameters={})]}, "needs either data, or its binary_data_size"),
        ({"inputs": [images(shape=[1] * 70_000)]}, "shape has 210000 bytes of JSON; at most 65536"),
        ({"inputs": [images(parameters={"x": "y" * 70_000})]}, r"images.parameters has 700\d\d bytes"),
        ({"inputs": [images()], "parameters": {"x": "y" * 70_000}}, r"parameters has 700\d\d bytes"),
        ({"inputs": [images()], "outputs": [{"name": "y" * 70_000}]}, r"outputs has 700\d\d bytes"),
        ({"inputs": [images()] * 1000}, "1000 inputs were given; one is needed"),
        ({"inputs": [images()], "id": 5}, r"Expected `str \| null`, got `int`"),
        ({"inputs": [images()], "outputs": [{"name": "y"}]}, "outputs: y is not what there is"),
        ({"inputs": [images()], "outputs": [{"name": "logits"}] * 2}, "logits, logits is not"),
        ({"inputs": [images()], "parameters": {"binary_data_output": 1}}, "must be true or false"),
        (
            {"inputs": [images(parameters={"shared_memory_region": "x"})]},
            "shared_memory_region is not supported",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(body: dict[str, Any] | bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read(body).pixels()


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", [1]])
def test_a_number_of_classes_that_cannot_be_is_refused(value: Any) -> None:
    outputs = [{"name": "logits", "parameters": {"classification": value}}]
    with pytest.raises(RequestError, match=r"classification=.* must be a whole number"):
        read({"inputs": [images()], "outputs": outputs})


@pytest.mark.parametrize(
    ("body", "rest", "says"),
    [
        (binary(), IMAGES.tobytes()[:-1], "95 bytes follow the JSON, but binary_data_size is 96"),
        (binary(), IMAGES.tobytes() + b"x", "97 bytes follow the JSON"),
        (binary(92), IMAGES.tobytes()[:-4], "are 96 bytes, not 92"),
        (binary(0), b"", "are 96 bytes, not 0"),
        (binary(-1), b"x", "binary_data_size=-1 must be a whole number"),
        (binary("96"), IMAGES.tobytes(), "binary_data_size='96' must be"),
        (binary(2**80), IMAGES.tobytes(), "binary_data_size"),
        (binary(shape=[2**62, 3, 2, 2]), IMAGES.tobytes(), "are 221360928884514619392 bytes"),
        (binary(data=[1.0]), IMAGES.tobytes(), "needs either data, or its binary_data_size"),
        ({"inputs": [images()]}, b"x", "1 bytes follow the JSON, but binary_data_size is not given"),
        (binary(), np.full(24, np.nan, np.float32).tobytes(), "holds NaN"),
        (binary(), np.full(24, -np.inf, np.float32).tobytes(), "infinite"),
    ],
)  # fmt: skip
def test_bytes_that_are_not_as_told_are_refused(
    body: dict[str, Any], rest: bytes, says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        read(body, rest).pixels()


@pytest.mark.parametrize("length", ["", "-1", "x", "1e3", "10000", "9" * 30, "٣", " 5", "0x10"])
def test_a_header_length_that_cannot_be_is_refused(length: str) -> None:
    with pytest.raises(RequestError, match="Inference-Header-Content-Length"):
        read(binary(), IMAGES.tobytes(), length)


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_header_length_that_cuts_elsewhere_is_noticed(difference: int) -> None:
    length = len(json.dumps(binary())) + difference
    with pytest.raises(RequestError, match=r"is not as it must be|bytes follow the JSON"):
        read(binary(), IMAGES.tobytes(), str(length))


def test_more_json_than_is_good_is_refused_and_says_how_else() -> None:
    with pytest.raises(RequestError, match=r"bytes of JSON are too many.*as binary data"):
        read(b" " * (16 << 20) + b"{}")


# --- files -------------------------------------------------------------------------------------


def files(num: int, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "files", "datatype": "BYTES", "shape": [num], **more}]}


def element(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5))
def test_files_come_as_bytes_or_in_base64(contents: list[bytes]) -> None:
    rest = b"".join(map(element, contents))
    body = files(len(contents), parameters={"binary_data_size": len(rest)})
    assert read(body, rest).files() == contents
    texts = [base64.b64encode(content).decode() for content in contents]
    assert read(files(len(contents), data=texts)).files() == contents


@pytest.mark.parametrize(
    ("num", "rest", "says"),
    [
        (2, element(b"abc"), "files has 1 elements, its shape 2"),
        (1, element(b"abc") * 2, "files has 2 elements, its shape 1"),
        (1, element(b"abc")[:-1], "ends amid element 0"),
        (2, element(b"abc") + b"\0\0", "ends amid the length of element 1"),
        (1, b"\xff\xff\xff\xffab", "ends amid element 0"),
    ],
)
def test_files_that_are_not_as_told_are_refused(num: int, rest: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read(files(num, parameters={"binary_data_size": len(rest)}), rest).files()


def test_text_that_is_no_base64_is_refused() -> None:
    with pytest.raises(RequestError, match=r"files\.data \(texts in base64\) is not as it must be"):
        read(files(1, data=["*"])).files()


def image_file(width: int, height: int, form: str = "PNG") -> bytes:
    out = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def test_a_file_becomes_what_a_folder_of_files_gives(tmp_path: Any) -> None:
    preprocessing = Preprocessing.of(None, 32)
    content = image_file(50, 40, "JPEG")
    (tmp_path / "a.jpg").write_bytes(content)
    expected = read_images(tmp_path, preprocessing)[1][0]
    assert torch.equal(decode_image(content, preprocessing), expected)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no image that can be read"),
        (image_file(50, 40)[:200], "no image that can be read"),
        (image_file(30000, 2), "an image of 30000 x 2 pixels; at most"),
    ],
)
def test_a_file_that_is_no_image_or_would_take_all_memory_is_refused(
    content: bytes, says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        decode_image(content, Preprocessing.of(None, 224))


# --- answers -----------------------------------------------------------------------------------


def answer(body: dict[str, Any], logits: Any = LOGITS) -> tuple[dict[str, Any], bytes]:
    """As JSON, and what follows it."""
    content, headers = respond(read(body), "m", logits, LABELS)
    length = int(headers.get("Inference-Header-Content-Length", len(content)))
    return json.loads(content[:length]), content[length:]


def test_logits_come_as_json_unless_bytes_are_asked_for() -> None:
    told, rest = answer({"inputs": [images()], "id": "7"})
    assert told == {
        "model_name": "m", "model_version": "1", "id": "7",
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [2, 3], "data": LOGITS.ravel().tolist()}
        ],
    }  # fmt: skip
    assert not rest


@pytest.mark.parametrize(
    "more",
    [
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": "logits", "parameters": {"binary_data": True}}]},
        {
            "parameters": {"binary_data_output": False},
            "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        },
    ],
)
def test_logits_come_as_bytes(more: dict[str, Any]) -> None:
    told, rest = answer({"inputs": [images()], **more})
    (output,) = told["outputs"]
    assert "id" not in told
    assert "data" not in output
    assert output["parameters"] == {"binary_data_size": len(rest)}
    assert np.array_equal(np.frombuffer(rest, "<f4").reshape(2, 3), LOGITS)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 1000])
def test_classes_come_best_first_with_their_labels(num_classes: int) -> None:
    outputs = [{"name": "logits", "parameters": {"classification": num_classes}}]
    (output,) = answer({"inputs": [images()], "outputs": outputs})[0]["outputs"]
    first = ["2.000000:2:dog: large", "0.500000:0:cat", "-1.000000:1"]
    second = ["3.000000:0:cat", "2.500000:1", "0.000000:2:dog: large"]
    assert output["data"] == first[:num_classes] + second[:num_classes]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, min(num_classes, 3)])
    outputs[0]["parameters"] |= {"binary_data": True}
    _, rest = answer({"inputs": [images()], "outputs": outputs})
    assert rest == b"".join(element(text.encode()) for text in output["data"])


def test_logits_that_json_cannot_say_are_not_made_null() -> None:
    with pytest.raises(RequestError, match="not all finite"):
        answer({"inputs": [images()]}, np.array([[np.nan]], np.float32))


@pytest.mark.parametrize(
    ("name", "datatype", "shape", "element"),
    [
        ("images", "FP32", [1, 3, 224, 224], b"0,"),
        ("images", "FP32", [1, 3, 224, 224], b"[[[0]]],"),
        ("images", "FP32", [1, 3, 224, 224], b"[],"),
        ("files", "BYTES", [1], b'"",'),
    ],
)
def test_more_elements_than_the_shape_has_are_refused_undecoded(
    name: str, datatype: str, shape: list[int], element: bytes
) -> None:
    count = (9 << 20) // len(element)
    told = f'"name": "{name}", "datatype": "{datatype}", "shape": {shape}'
    body = b'{"inputs": [{%s, "data": [%s]}]}' % (told.encode(), (element * count)[:-1])
    asked = parse(body, None, 224, INPUTS)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match=f"has {count} elements; its shape"):
            asked.pixels() if name == "images" else asked.files()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
