"""`bireme serve` of a vision model: Triton's own client, raw HTTP, and how it ends."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http as triton
from PIL import Image
from served import DEADLINE_S, Answer, Served, children, serving
from streaming import watching
from test_shutdown import check_all_ended, command, until

from bireme.cli import run as bireme
from bireme.vision.live import Pixels
from bireme.vision.model import find_model
from bireme.vision.preprocessing import made_up_images
from vision.reference import whole
from vision.test_stages import TOLERANCE, difference

MODEL, SIDE, NUM_CLASSES = "vision.networks:Network", 8, 5
PATH = f"/v2/models/{MODEL}"
ROOT = Path(__file__).parent.parent
SMALL = ("--image-size", str(SIDE), "--threads", "1", "--max-batch-size", "4")


def environment() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    options = (*SMALL, "-pp", "2", "--max-queue-size", "64", "--max-body-bytes", "64KiB")
    with serving(*options, model=MODEL, env=environment()) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"{server.host}:{server.port}", concurrency=8) as found:
        yield found


def images_of(num: int, seed: int = 0) -> Pixels:
    found: Pixels = made_up_images(num, (3, SIDE, SIDE), seed).numpy()
    return found


def expected(images: Pixels) -> torch.Tensor:
    return whole(find_model(MODEL, None, image_size=SIDE), torch.from_numpy(images))


def given(images: Pixels, *, binary: bool = True) -> list[triton.InferInput]:
    tensor = triton.InferInput("images", list(images.shape), "FP32")
    return [tensor.set_data_from_numpy(images, binary_data=binary)]


def test_its_page_shows_images(server: Served) -> None:
    assert server.ask("GET", "/").headers["content-type"].startswith("text/html")
    with watching(server) as following:
        moment = following()
    assert not moment["server"]["can_chat"]
    assert [rank["stage"] for rank in moment["server"]["ranks"]] == [0, 1]
    assert {"num_running", "num_waiting", "num_images_total"} <= set(moment["stats"])
    assert len(moment["ledger"]["gantt"]["ranks"]) == 2
    assert "e2e_request_latency_seconds" in moment["counts"]["histograms"]


def test_tritons_client_finds_what_there_is(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "classification"]
    told = client.get_model_metadata(MODEL)
    assert (told["name"], told["versions"]) == (MODEL, ["1"])
    assert told["inputs"] == [
        {"name": "images", "datatype": "FP32", "shape": [-1, 3, SIDE, SIDE]},
        {"name": "files", "datatype": "BYTES", "shape": [-1]},
    ]
    assert told["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, NUM_CLASSES]}]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("num_images", [1, 11])
def test_tritons_client_gets_what_one_device_computes(
    client: triton.InferenceServerClient, num_images: int, binary: bool
) -> None:
    images = images_of(num_images)
    outputs = [triton.InferRequestedOutput("logits", binary_data=binary)]
    found = client.infer(
        MODEL, given(images, binary=binary), request_id="seven", outputs=outputs, model_version="1"
    )
    assert found.get_response()["id"] == "seven"
    assert difference(torch.tensor(found.as_numpy("logits")), expected(images)) < TOLERANCE


def test_many_of_tritons_requests_at_once(client: triton.InferenceServerClient) -> None:
    images = [images_of(1 + seed % 5, seed) for seed in range(20)]
    asked = [client.async_infer(MODEL, given(one)) for one in images]
    for one, answer in zip(images, asked, strict=True):
        logits = torch.tensor(answer.get_result().as_numpy("logits"))
        assert difference(logits, expected(one)) < TOLERANCE


def test_tritons_client_gets_classes(client: triton.InferenceServerClient) -> None:
    images = images_of(3)
    outputs = [triton.InferRequestedOutput("logits", class_count=2)]
    found = client.infer(MODEL, given(images), outputs=outputs).as_numpy("logits")
    best = expected(images).topk(2).indices.tolist()
    assert [[int(text.decode().split(":")[1]) for text in row] for row in found] == best


def test_image_files_are_prepared_by_the_server(client: triton.InferenceServerClient) -> None:
    from test_kserve_protocol import image_file

    from bireme.vision.preprocessing import Preprocessing, decode_image

    contents = [image_file(50, 40, "JPEG"), image_file(20, 30)]
    tensor = triton.InferInput("files", [2], "BYTES")
    tensor.set_data_from_numpy(np.array(contents, dtype=np.object_))
    logits = client.infer(MODEL, [tensor]).as_numpy("logits")
    images = torch.stack([decode_image(it, Preprocessing.of(None, SIDE)) for it in contents])
    assert difference(torch.tensor(logits), expected(images.numpy())) < TOLERANCE
    tensor.set_data_from_numpy(np.array([contents[0], b"none"], dtype=np.object_))
    with pytest.raises(triton.InferenceServerException, match=r"files\[1\] is no image") as caught:
        client.infer(MODEL, [tensor])
    assert caught.value.status() == "400"


def large_image() -> bytes:
    """33 million pixels in 4 KB."""
    out = BytesIO()
    Image.new("1", (5792, 5792)).save(out, "PNG")
    return out.getvalue()


def files(contents: list[bytes]) -> dict[str, Any]:
    data = [base64.b64encode(content).decode() for content in contents]
    return {"inputs": [{"name": "files", "datatype": "BYTES", "shape": [len(data)], "data": data}]}


def test_more_pixels_than_one_request_may_have_are_refused(server: Served) -> None:
    refused = server.ask("POST", f"{PATH}/infer", files([large_image()] * 9))
    assert refused.status == 400
    assert error(refused) == (
        f"files have {9 * 5792**2} pixels; at most {1 << 28} are taken in one request"
    )


def test_tritons_client_understands_errors(client: triton.InferenceServerClient) -> None:
    with pytest.raises(
        triton.InferenceServerException, match="there is no model 'other'"
    ) as caught:
        client.infer("other", given(images_of(1)))
    assert caught.value.status() == "404"
    with pytest.raises(triton.InferenceServerException, match="no version '2'"):
        client.infer(MODEL, given(images_of(1)), model_version="2")
    wide = triton.InferInput("images", [1, 3, SIDE, SIDE], "FP64")
    wide.set_data_from_numpy(images_of(1).astype(np.float64))
    with pytest.raises(triton.InferenceServerException, match="must be FP32, not FP64"):
        client.infer(MODEL, [wide])
    assert client.infer(MODEL, given(images_of(1))), "and goes on"


def body(images: Pixels, **more: Any) -> dict[str, Any]:
    told = {"name": "images", "datatype": "FP32", "shape": list(images.shape)}
    return {"inputs": [{**told, "data": images.ravel().tolist(), **more}]}


def error(answer: Answer) -> str:
    """As KServe has them: one text."""
    assert set(answer.json) == {"error"}
    text = answer.json["error"]
    assert isinstance(text, str)
    assert text
    return text


@pytest.mark.parametrize(
    ("method", "path", "sent", "headers", "status", "says"),
    [
        ("POST", f"{PATH}/infer", b"{", {}, 400, "the body is not"),
        ("POST", f"{PATH}/infer", body(images_of(1), shape=[1, 3, 9, 8]), {}, 400, "the shape"),
        ("POST", f"{PATH}/infer", body(images_of(65), data=[]), {}, 400, "at most 64"),
        ("POST", f"{PATH}/infer", body(images_of(1), shape=[2**70, 3, 8, 8]), {}, 400, "too many"),
        (
            "POST", f"{PATH}/infer", b"{}", {"Inference-Header-Content-Length": "3"}, 400,
            "Inference-Header-Content-Length 3",
        ),
        (
            "POST", f"{PATH}/infer", body(images_of(1)), {"Content-Encoding": "gzip"}, 400,
            "Content-Encoding gzip",
        ),
        ("POST", f"{PATH}/infer", b"x" * (65 << 10), {}, 413, "--max-body-bytes"),
        ("POST", "/v2/models/other/infer", body(images_of(1)), {}, 404, "there is no model 'other'"),
        ("GET", "/v2/models/other", None, {}, 404, "there is no model 'other'"),
        ("GET", "/v2/models/other/ready", None, {}, 404, "there is no model 'other'"),
        ("GET", f"{PATH}/versions/2", None, {}, 404, "no version '2'"),
        ("GET", f"{PATH}/infer", None, {}, 405, "use POST"),
        ("GET", "/v1/models", None, {}, 404, "KServe's routes begin with /v2"),
        ("GET", "/debug/ledger?seconds=0", None, {}, 400, "greater than 0"),
        ("POST", f"{PATH}/infer", body(images_of(1)), {"Origin": "http://x"}, 403, "may not ask"),
    ],
)  # fmt: skip
def test_errors_are_told_as_kserve_tells_them(
    server: Served, method: str, path: str, sent: Any, headers: Any, status: int, says: str
) -> None:
    answer = server.ask(method, path, sent, headers)
    assert answer.status == status
    assert says in error(answer)


def test_what_any_server_tells_of_itself(server: Served) -> None:
    images = images_of(6)
    before = server.metric("images_total")
    assert server.ask("POST", f"{PATH}/infer", body(images)).status == 200
    assert server.metric("images_total") == before + 6
    assert server.metric("engine_ready") == 1
    assert server.metric("num_images_running") == 0
    assert server.ask("GET", "/health").json == {"status": "ready"}
    assert server.ask("GET", "/v2/health/live").json == {"live": True}
    assert [rank["device"] for rank in server.ask("GET", "/debug/setup").json["ranks"]] == [
        "cpu"
    ] * 2
    ledger = server.ask("GET", "/debug/ledger?seconds=5").json
    assert [rank["stage"] for rank in ledger["ranks"]] == [0, 1]
    for rank in ledger["ranks"]:
        assert rank["shares"]["compute"] > 0
        assert rank["shares"]["starved"] > 0
    assert bireme(["doctor", server.url, "--seconds", "0.5"]) == 0
    server.wait_for(r"request .*path=/v2/models/\S+/infer status=200 .*images=6 queue_ms=")
    done = subprocess.run(["bash", "-c", f"{server.curl} -s"], capture_output=True, check=True)
    assert json.loads(done.stdout)["name"] == MODEL


def waits(num_images: int) -> str:
    labels = f'engine="0",model_name="{MODEL}"'
    return f"bireme:num_images_waiting{{{labels}}} {num_images}.0"


def test_keys_bounds_and_how_it_ends() -> None:
    """One server: with a key, with a queue that is full, and told to end while a request waits."""
    options = (*SMALL, "--max-queue-size", "3", "--max-queue-delay-ms", "2000", "--api-key", "k")
    with serving(*options, model=MODEL, env=environment()) as server:
        pids = server.descendants()
        key = {"Authorization": "Bearer k"}
        refused = server.ask("POST", f"{PATH}/infer", body(images_of(1)))
        assert refused.status == 401
        assert "API key" in error(refused)
        assert server.ask("GET", "/v2").status == 401
        assert server.ask("GET", "/v2/health/ready").json == {"ready": True}
        answers: list[Answer] = []

        def ask() -> None:
            answers.append(server.ask("POST", f"{PATH}/infer", body(images_of(2)), key))

        waiting = threading.Thread(target=ask)
        waiting.start()
        until(lambda: server.ask("GET", "/load", headers=key).json == {"server_load": 1})
        until(lambda: waits(2) in server.ask("GET", "/metrics", headers=key).text)
        full = server.ask("POST", f"{PATH}/infer", body(images_of(2)), key)
        assert full.status == 429
        assert "2 images of 3 are there; try again later" in error(full)
        assert full.headers["retry-after"]
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("shutting down requests=1")
        assert server.ask("GET", "/v2/health/ready").status == 503
        assert server.ask("GET", "/v2/health/live").status == 200
        assert server.ask("POST", f"{PATH}/infer", body(images_of(1)), key).status == 503
        waiting.join(DEADLINE_S)
        assert [answer.status for answer in answers] == [200]
        assert server.end() == 0
        check_all_ended(pids)


def test_a_client_that_leaves_and_a_killed_rank() -> None:
    options = (*SMALL, "--max-queue-delay-ms", "60000")
    with serving(*options, model=MODEL, env=environment()) as server:
        (rank,) = [pid for pid in children(server.pid) if b"vision.worker" in command(pid)]
        connection = http.client.HTTPConnection(server.host, server.port, timeout=DEADLINE_S)
        connection.request("POST", f"{PATH}/infer", json.dumps(body(images_of(1))))
        until(lambda: server.metric("num_images_waiting") == 1)
        leaving = http.client.HTTPConnection(server.host, server.port, timeout=DEADLINE_S)
        leaving.request("POST", f"{PATH}/infer", json.dumps(body(images_of(2))))
        until(lambda: server.metric("num_images_waiting") == 3)
        leaving.close()
        until(lambda: server.metric("num_images_waiting") == 1)
        os.kill(rank, signal.SIGKILL)
        response = connection.getresponse()
        assert response.status == 503
        assert "rank 0 (stage 0, tp 0)" in json.loads(response.read())["error"]
        connection.close()
        health = server.ask("GET", "/health")
        assert (health.status, health.json["status"]) == (503, "broken")
        assert "rank 0" in health.json["error"]
        assert server.ask("GET", "/v2/health/ready").status == 503
        assert server.ask("GET", PATH + "/ready").json == {"name": MODEL, "ready": False}
        refused = server.ask("POST", f"{PATH}/infer", body(images_of(1)))
        assert refused.status == 503
        assert "rank 0" in error(refused)
        assert server.metric("engine_ready") == 0
        check_all_ended([rank])
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


def test_a_server_that_ends_decodes_no_more_files() -> None:
    options = (*SMALL, "--shutdown-timeout", "0")
    with serving(*options, model=MODEL, env=environment()) as server:
        answers: list[Answer] = []
        asked = files([large_image()] * 8)
        asking = [
            threading.Thread(
                target=lambda: answers.append(server.ask("POST", f"{PATH}/infer", asked))
            )
            for _ in range(6)
        ]
        for one in asking:
            one.start()
        until(lambda: server.ask("GET", "/load").json == {"server_load": len(asking)})
        server.process.send_signal(signal.SIGTERM)
        for one in asking:
            one.join(DEADLINE_S)
        assert [answer.status for answer in answers] == [503] * len(asking)
        assert {error(answer) for answer in answers} == {"the server is shutting down"}
        assert server.end() == 0
        assert not any("Traceback" in line for line in server.told)


@pytest.mark.parametrize(
    ("model", "options", "complaint"),
    [
        (MODEL, ("-tp", "2"), "--tensor-parallel-size is for language models, and .* -pp"),
        (MODEL, ("--max-num-seqs", "3"), "--max-num-seqs is for language .* --max-batch-size"),
        (MODEL, ("--chat-template", "x"), "--chat-template is for language models.*leave it out"),
        ("demo", ("--split", "layer3"), "--split is for vision models, .* --layers-per-stage"),
        ("demo", ("--max-queue-delay-ms", "5"), "--max-queue-delay-ms is for vision models"),
        (MODEL, ("--max-queue-delay-ms", "-5"), "max_queue_delay_ms=-5 must be from 0"),
        (MODEL, ("--split", "a,b", "-pp", "2"), "--split a,b makes 3 stages"),
        (MODEL, ("--served-model-name", "a/b"), "a/b has a slash"),
        ("vision.networks:nothing", (), "has no function nothing"),
    ],
)
def test_options_of_the_other_kind_of_model_are_refused_in_a_line(
    model: str, options: tuple[str, ...], complaint: str, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from bireme.cli import run

    monkeypatch.syspath_prepend(str(ROOT))
    assert run(["serve", model, "--port", "0", *options]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("bireme: ")
    assert re.search(complaint, line), line
