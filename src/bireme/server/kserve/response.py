"""What a client is sent for its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from bireme.errors import RequestError
from bireme.server.kserve.request import LOGITS, Inference
from bireme.vision.live import Pixels

VERSION = "1"  # of a model: there is no other


def respond(
    inference: Inference, model_name: str, logits: Pixels, labels: Mapping[int, str]
) -> tuple[bytes, dict[str, str]]:
    """The body and its headers."""
    output, payload = _output(inference, logits, labels)
    body: dict[str, Any] = {"model_name": model_name, "model_version": VERSION}
    if inference.id is not None:
        body["id"] = inference.id
    body["outputs"] = [output]
    text = msgspec.json.encode(body)
    if payload is None:
        return text, {"Content-Type": "application/json"}
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(text)),
    }
    return text + payload, headers


def _output(
    inference: Inference, logits: Pixels, labels: Mapping[int, str]
) -> tuple[dict[str, Any], bytes | None]:
    """As JSON, and the bytes that are not in it."""
    output: dict[str, Any] = {"name": LOGITS, "datatype": "FP32", "shape": list(logits.shape)}
    if inference.num_classes is not None:
        texts = _classes(logits, inference.num_classes, labels)
        output |= {"datatype": "BYTES", "shape": [len(texts), len(texts[0])]}
        data: list[Any] = [text for row in texts for text in row]
        payload = b"".join(_element(text.encode()) for text in data)
    else:
        data, payload = logits.ravel().tolist(), logits.astype("<f4").tobytes()
    if inference.is_binary_wanted:
        output["parameters"] = {"binary_data_size": len(payload)}
        return output, payload
    if not np.isfinite(logits).all():
        raise RequestError(
            "the logits are not all finite, which JSON cannot say; ask for binary_data"
        )
    output["data"] = data
    return output, None


def _classes(logits: Pixels, num_classes: int, labels: Mapping[int, str]) -> list[list[str]]:
    """Of each image `score:index`, and `:label` where there is one; the best first."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :num_classes]
    return [
        [
            f"{row[index]:f}:{index}" + (f":{labels[index]}" if index in labels else "")
            for index in map(int, indices)
        ]
        for row, indices in zip(logits, best, strict=True)
    ]


def _element(value: bytes) -> bytes:
    return len(value).to_bytes(4, "little") + value
