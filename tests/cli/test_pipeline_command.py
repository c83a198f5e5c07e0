"""`bireme pipeline`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from bireme.cli import run

ROOT = Path(__file__).parent.parent
NETWORK = ["pipeline", "vision.networks:Network", "--image-size", "8", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _from_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks find `vision.networks` here, on a machine that does nothing else: a busy one is told of."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("bireme.planning.probe.hardware.load_average", lambda: 0.0)


def test_the_plan_comes_first_and_then_the_sweep(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    status = run(
        [*NETWORK, "--batch", "7", "--micro-batches", "1,3", "--split", "blocks.1,blocks.3",
         "--runs", "1", "--trace", str(trace)]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert status == 0
    assert "5 blocks in 3 stages on cpu, cpu, cpu" in out
    assert "rank 2    .   . 2F0 2F1 2F2" in out
    assert out.index("hands over") < out.index("(p-1)/(m+p-1)")
    assert "66.7%" in out, "the textbook's bubble of 3 stages and 1 micro-batch"
    assert re.search(r"largest difference to one device: .*, of logits up to .* is allowed\)", out)
    tracks = json.loads(trace.read_text())["traceEvents"]
    assert {event["tid"] for event in tracks} == {0, 1, 2, 3}  # the last is the driver's
    assert {"step", "compute", "send", "recv"} <= {event["name"] for event in tracks}
    assert run(["ledger", str(trace)]) == 0
    told = capsys.readouterr().out
    assert "fill drain" in told
    assert "token dependency" not in told.partition("rank 0 ")[0].partition("0-9")[0]


def test_a_plan_alone_names_every_block_that_a_stage_can_begin_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*NETWORK, "--batch", "6", "--micro-batches", "3", "--plan-only"]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^ *blocks\.3 +[\d.]+ ms .* 1 *$", shown, re.MULTILINE), shown
    assert "(p-1)/(m+p-1)" not in shown
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [block["name"] for block in found["blocks"]]
    assert run([*NETWORK, "--batch", "6", "--split", names[1], "--plan-only", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"][1]["first"] == 1
    assert "pipeline" not in found


def test_the_ledger_is_of_the_best_trial_and_of_nothing_around_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*NETWORK, "--batch", "6", "--micro-batches", "1,3", "--runs", "1"]
    assert run([*command, "--ledger", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    best = f"where the time went, with {found['best_micro_batches']} micro-batch"
    assert best in shown.err
    assert "fill drain" in shown.err
    for trial in found["pipeline"]:
        for bubble, shares in zip(trial["bubbles"], trial["ledger"].values(), strict=True):
            assert shares["compute"] == pytest.approx(1 - bubble, abs=1e-3)
            assert sum(shares.values()) == pytest.approx(1)


def test_images_of_a_folder_get_their_most_likely_classes_as_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for index in range(3):
        Image.new("RGB", (20, 10), (80 * index, 10, 10)).save(tmp_path / f"{index}.png")
    command = [*NETWORK, "--images", str(tmp_path), "--runs", "1", "--top", "2", "--json"]
    assert run([*command, "--memory-limit", "22KiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == 3
    assert [trial["micro_batches"] for trial in found["pipeline"]] == [1, 2]
    assert [trial["fits"] for trial in found["one_device"]] == [False, False]
    assert [trial["fits"] for trial in found["pipeline"]] == [False, True]
    assert found["speed_up"] is None
    assert list(found["top"]) == ["0.png", "1.png", "2.png"]
    assert all(len(classes) == 2 for classes in found["top"].values())


def test_images_are_not_made_in_a_size_that_the_checkpoint_does_not_ask_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ResNetForImageClassification(
        ResNetConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, embedding_size=8)
    ).save_pretrained(tmp_path)
    asked = {"size": {"shortest_edge": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(asked))
    command = ["pipeline", str(tmp_path), "--images", str(tmp_path), "--image-size", "32"]
    assert run(command) == 2
    assert "leave it out, or give 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*NETWORK, "--batch", "4", "--micro-batches", "2,8"], "4 images cannot make 8 micro-batches"),
        ([*NETWORK, "--split", "blocks.9"], "split point blocks.9 is no point to cut at"),
        ([*NETWORK, "--split", "foo"], "of 4 that can be cut the first are blocks.0, blocks.1, blocks.2"),
        ([*NETWORK, "--split", ","], "--split ',' has an empty name; give blocks like layer3.0"),
        ([*NETWORK, "--split", ""], "--split '' has an empty name; give blocks like layer3.0"),
        ([*NETWORK, "--split", "blocks.1", "-pp", "3"], "makes 2 stages, but pipeline_parallel_size is 3"),
        ([*NETWORK, "-pp", "6"], "pipeline_parallel_size=6 exceeds the 5 blocks; use at most 5"),
        ([*NETWORK, "--memory-limit", "1KiB"], "64 images of 8 x 8 alone take 48.0 KiB, more than the 1.0 KiB"),
        (["pipeline", "vision.networks:Network", "--image-size", "100000", "--memory-limit", "1GiB"],
         "64 images of 100000 x 100000 alone take"),
        ([*NETWORK, "--image-size", "-5"], "image_size=-5 must be at least 1"),
        ([*NETWORK, "--batch", "1", "--memory-limit", "1KiB"], "does not fit 2 devices of 1.0 KiB"),
        ([*NETWORK, "--runs", "0"], "runs=0 must be at least 1"),
        (["pipeline", "--config", "resnet-18", "--image-size", "0"], "image_size=0 must be at least 1"),
        (["pipeline", "vision.networks:Dense", "--image-size", "8"], r"makes [3, 8, 8] of an image"),
        (["pipeline", "vision.networks:broken"], "broken cannot be made: ValueError: out of order"),
        (["pipeline", "vision.networks:Residual"], "Residual cannot be made: TypeError: "),
        (["pipeline", "resnet-19"], "resnet-19 is no folder; did you mean resnet-18"),
        ([*NETWORK, "--split", "stem"], "split point stem is where the model begins; "),
        (["pipeline"], "give either MODEL or --config NAME"),
        (["pipeline", "--config", "resnet-51"], "the closest is resnet-50"),
        (["pipeline", "--config", "vit-b16", "--image-size", "100"], "must be a multiple of vit-b16's patch"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    status = run(arguments)
    err = capsys.readouterr().err.strip()
    assert status == 2
    assert says in err
    assert "\n" not in err


@pytest.mark.parametrize(
    ("factor", "says"),
    [
        (
            "(1 + os.getpid() % 1000)",
            "the stages differ from one device by",
        ),  # another in each process
        ("float('inf')", "logits are not finite"),
    ],
)
def test_wrong_logits_are_noticed(
    factor: str,
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "wrong.py").write_text(
        "import os\nfrom vision.networks import Network\n\n\nclass Wrong(Network):\n"
        f"    def forward(self, x):\n        return super().forward(x).abs() * {factor}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wrong", raising=False)
    arguments = ["pipeline", "wrong:Wrong", *NETWORK[2:], "--batch", "4", "--micro-batches", "2"]
    assert run([*arguments, "--runs", "1"]) == 1
    assert f"at 2 micro-batches {says}" in capsys.readouterr().err


def test_a_module_that_mixes_images_is_told_from_wrong_stages(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["pipeline", "vision.networks:Mixing", *NETWORK[2:], "--batch", "4", "--runs", "2"]
    assert run([*arguments, "--micro-batches", "1,2"]) == 1
    captured = capsys.readouterr()
    assert "depends on the others of its batch" in captured.err
    assert "images/s ±" in captured.out


WRONG_CUT = """
from bireme.vision import stage

whole = stage.make_forward


def make_forward(blocks, device, *, is_captured):  # the second stage, of three blocks, begins a block too late
    return whole(blocks[1:] if len(blocks) == 3 else blocks, device, is_captured=is_captured)


stage.make_forward = make_forward
"""


def test_a_wrong_cut_is_noticed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in the ranks' processes."""
    command = [
        *NETWORK,
        "--batch",
        "4",
        "--micro-batches",
        "2",
        "--runs",
        "1",
        "--split",
        "blocks.1",
    ]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert run(command) == 0
    (tmp_path / "sitecustomize.py").write_text(WRONG_CUT)
    assert run(command) == 1
    assert "the stages differ from one device by" in capsys.readouterr().err


def test_a_module_that_mixes_images_is_told_at_one_number_of_micro_batches_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["pipeline", "vision.networks:Mixing", *NETWORK[2:], "--batch", "4", "--runs", "1"]
    assert run([*command, "--micro-batches", "2"]) == 1
    assert "depends on the others of its batch" in capsys.readouterr().err


def test_what_fits_no_single_device_is_checked_as_well(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endless.py").write_text(
        "from vision.networks import Network\n\n\nclass Endless(Network):\n"
        "    def forward(self, x):\n        return super().forward(x) * float('inf')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["pipeline", "endless:Endless", *NETWORK[2:], "--batch", "3", "--runs", "1"]
    split = ["--split", "blocks.1,blocks.2", "--memory-limit", "15KiB"]
    assert run([*command, "--micro-batches", "3", *split]) == 1
    said = capsys.readouterr()
    assert "logits are not finite" in said.err
    assert "fits 3; what it computes is compared with no other" in said.out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--threads", "9999"], r"threads=9999 exceeds the \d+ cores"),
        (["--batch", "64", "--micro-batches", "64", "--batches", "400"], "use at most 256 batches"),
    ],
)
def test_more_than_a_host_or_a_ring_has_is_refused(
    more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*NETWORK, *more]) == 2
    assert re.search(says, capsys.readouterr().err)
