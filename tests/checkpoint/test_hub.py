"""MODEL as a Hub id: the local cache first, then the Hub, only the files that are needed.

Each call is a process of its own: huggingface_hub reads its environment once, when imported.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bireme
from bireme.checkpoint.hub import resolve_model
from bireme.errors import CheckpointError
from checkpoint.fake_hub import FakeHub, serving

CALL = """
import json, sys
from bireme.checkpoint.hub import resolve_model
from bireme.errors import CheckpointError
try:
    print(resolve_model(sys.argv[1], **json.loads(sys.argv[2])))
except CheckpointError as error:
    print(f"CheckpointError: {error}")
assert "torch" not in sys.modules
"""
CONFIGS = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"model": {}}',
    "vocab.json": b'{"a": 0}',
    "merges.txt": b"#version: 0.2",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# A model",
    "original/consolidated.safetensors": b"the same weights once more",
    "onnx/config.json": b"[]",
}
BIN = {"pytorch_model.bin": b"pickled", "training_args.bin": b"something else"}
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
MODELS = {
    "org/single": {**CONFIGS, **BIN, "model.safetensors": b"1", "model.fp16.safetensors": b"2"},
    "org/sharded": {
        **CONFIGS,
        "model.safetensors.index.json": json.dumps(INDEX).encode(),
        "model-1.safetensors": b"first",
        "model-2.safetensors": b"second",
        "consolidated.safetensors": b"both in one",
    },
    "org/pickled": {**CONFIGS, **BIN},
    "org/no-weights": CONFIGS,
    "org/no-model": {"README.md": b"# Nothing"},
}
SMALL = {"config.json", "tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja"}


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with serving(MODELS) as served:
        yield served


@pytest.fixture(autouse=True)
def _forgets_what_was_asked(hub: FakeHub) -> None:
    hub.status = 200
    hub.asked.clear()


def resolve(url: str, home: Path, model: str, env: dict[str, str] | None = None, **options: bool):
    """What a new process prints: the folder, or the one line of an error."""
    settings = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "PYTHONPATH": str(Path(bireme.__file__).parent.parent),
        "PATH": os.environ["PATH"],
        "NO_PROXY": "127.0.0.1",
        **(env or {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", CALL, model, json.dumps(options)],
        env=settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return line


def names_in(folder: str) -> set[str]:
    root = Path(folder)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("model", "options", "weights"),
    [
        ("org/single", {}, {"model.safetensors"}),
        ("org/single", {"reads_bin": True}, {"model.safetensors"}),
        (
            "org/sharded",
            {},
            {"model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"},
        ),
        ("org/pickled", {"reads_bin": True}, {"pytorch_model.bin"}),
        ("org/single", {"needs_weights": False}, set()),
    ],
)
def test_only_what_is_needed_is_fetched_and_nothing_twice(
    model: str, options: dict[str, bool], weights: set[str], hub: FakeHub, tmp_path: Path
) -> None:
    folder = resolve(hub.url, tmp_path, model, **options)
    assert names_in(folder) == hub.fetched == SMALL | weights
    for name in SMALL | weights:
        assert (Path(folder) / name).read_bytes() == MODELS[model][name]
    hub.asked.clear()
    assert resolve(hub.url, tmp_path, model, **options) == folder
    assert hub.asked == []
    offline = {"HF_HUB_OFFLINE": "1"}
    assert resolve("http://127.0.0.1:9", tmp_path, model, offline, **options) == folder


def test_weights_come_when_only_the_configs_are_cached(hub: FakeHub, tmp_path: Path) -> None:
    folder = resolve(hub.url, tmp_path, "org/sharded", needs_weights=False)
    assert names_in(folder) == SMALL | {"model.safetensors.index.json"}
    hub.asked.clear()
    assert resolve(hub.url, tmp_path, "org/sharded") == folder
    assert hub.fetched == {"model-1.safetensors", "model-2.safetensors"}
    (Path(folder) / "model-2.safetensors").unlink()
    hub.asked.clear()
    assert resolve(hub.url, tmp_path, "org/sharded") == folder
    assert (Path(folder) / "model-2.safetensors").read_bytes() == b"second"
    assert hub.fetched <= {"model-2.safetensors"}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/unknown", "org/unknown is no folder here and no model on the Hub"),
        ("org/pickled", "holds .bin files only; `bireme shard org/pickled OUT` reads those"),
        ("org/no-weights", "org/no-weights has no safetensors file on the Hub"),
        ("org/no-model", "org/no-model has no config.json on the Hub"),
    ],
)
def test_what_the_hub_has_not_is_told_and_no_weights_are_fetched(
    model: str, expected: str, hub: FakeHub, tmp_path: Path
) -> None:
    said = resolve(hub.url, tmp_path, model)
    assert said.startswith("CheckpointError: ")
    assert expected in said
    assert hub.fetched <= SMALL


@pytest.mark.parametrize("status", [401, 403, 500])
def test_an_answer_that_is_none_is_told(status: int, hub: FakeHub, tmp_path: Path) -> None:
    hub.status = status
    said = resolve(hub.url, tmp_path, "org/single")
    assert said.startswith("CheckpointError: org/single is ")
    assert status == 401 or str(status) in said


def dead_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_no_network_is_told(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{dead_port()}"
    said = resolve(url, tmp_path, "org/single")
    assert f"not whole in the local Hub cache, and fetching it from {url} failed: " in said


def test_a_broken_proxy_is_told(tmp_path: Path) -> None:
    proxy = f"http://127.0.0.1:{dead_port()}"
    env = {"HTTP_PROXY": proxy, "http_proxy": proxy, "NO_PROXY": ""}
    said = resolve("http://hub.invalid", tmp_path, "org/single", env)
    assert "and fetching it from http://hub.invalid failed: " in said


def test_offline_is_told_and_nobody_is_asked(hub: FakeHub, tmp_path: Path) -> None:
    said = resolve(hub.url, tmp_path, "org/single", {"HF_HUB_OFFLINE": "1"})
    assert "not in the local Hub cache, and HF_HUB_OFFLINE forbids to fetch it" in said
    assert hub.asked == []


def test_a_path_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(tmp_path / "config.json")) == tmp_path
    assert (resolve_model("demo") / "config.json").parent.name == "demo"


@pytest.mark.parametrize(
    "model", ["nowhere", "./nowhere", "../a/b", "/no/where", "~/nowhere", "a/b/c", "", "-/../x"]
)
def test_what_can_be_no_hub_id_is_told_without_asking(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"is no folder; give a folder with a config\.json"):
        resolve_model(model)
