"""The command line: what users type, right and wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bireme.cli import run
from bireme.engine.pool import WorkerPool

FLAGS = ["--dtype", "float32"]


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    status = run(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "demo"
    assert run(["shard", "demo", str(out), "-tp", "2", "-pp", "2", "--quiet"]) == 0
    return out


def test_a_command_line_streams_an_answer() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bireme",
            "generate",
            "demo",
            "What does math.sqrt do?",
            "--chat",
            "-tp",
            "2",
            *FLAGS,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Return the square root of x." in done.stdout
    assert "rank 1 (stage 0, tp 1): weights" in done.stderr
    assert "tokens/s" in done.stderr


def test_json_lines_have_the_promised_keys(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "If the"}\n\n{"prompt_token_ids": [5, 6, 7]}\n')
    status, out, _ = cli(
        capsys,
        "generate",
        "demo",
        "--prompts-file",
        str(prompts),
        "--max-tokens",
        "5",
        "--ignore-eos",
        "--json",
    )
    lines = sorted((json.loads(line) for line in out.splitlines()), key=lambda line: line["index"])
    assert status == 0
    assert [line["index"] for line in lines] == [0, 1]
    assert lines[1]["prompt_token_ids"] == [5, 6, 7]
    for line in lines:
        assert list(line) == [
            "index", "choice", "prompt_token_ids", "token_ids", "text", "finish_reason", "stop_reason",
            "ttft_s", "tokens_per_s",
        ]  # fmt: skip
        assert len(line["token_ids"]) == 5
        assert line["finish_reason"] == "length"
        assert line["ttft_s"] > 0


def test_several_prompts_and_a_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    status, out, _ = cli(
        capsys,
        "generate",
        "demo",
        "If the",
        "Return",
        "-pp",
        "2",
        "--max-tokens",
        "4",
        "--trace",
        str(trace),
        "-q",
    )
    assert status == 0
    assert "--- prompt 0" in out
    assert "--- prompt 1" in out
    assert len(json.loads(trace.read_text())["traceEvents"]) > 20


def test_several_answers_are_printed_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "demo", "The", "--n", "2", "--temperature", "1", "--seed", "1"]
    asked += ["--max-tokens", "6", "--ignore-eos"]
    out = cli(capsys, *asked, "--echo", "-q")[1]
    lines = [json.loads(line) for line in cli(capsys, *asked, "--json")[1].splitlines()]
    assert [line["choice"] for line in lines] == [0, 1]
    assert lines[0]["text"] != lines[1]["text"]
    assert out == "".join(
        f"--- prompt 0, answer {line['choice']}\nThe{line['text']}\n" for line in lines
    )


def test_an_echoed_question_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "demo", "What does math.sqrt do?", "--chat", "--echo", "-q"]
    out = cli(capsys, *asked, "--stop", "square", "--max-tokens", "20")[1]
    assert out == "What does math.sqrt do?\nmath.sqrt(x, /)\n\nReturn the \n"


def test_json_shows_how_likely_tokens_were(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "demo", "The with statement is", "--max-tokens", "3", "--json", "--echo"]
    line = json.loads(cli(capsys, *asked, "--logprobs", "2", "--prompt-logprobs", "1")[1])
    assert line["prompt"] == "The with statement is"
    assert [entry["id"] for entry in line["logprobs"]] == line["token_ids"]
    for entry in line["logprobs"]:  # greedy
        assert entry["rank"] == 1
        assert [top["rank"] for top in entry["top_logprobs"]] == [1, 2]
    assert line["prompt_logprobs"][0] is None
    told = [entry["id"] for entry in line["prompt_logprobs"][1:]]
    assert told == line["prompt_token_ids"][1:]
    for entry in line["prompt_logprobs"][1:]:
        assert entry["top_logprobs"][0]["rank"] == 1
        assert entry["id"] in [top["id"] for top in entry["top_logprobs"]]


@pytest.mark.parametrize(
    ("asked", "matches"),
    [
        (["--json-schema", '{"enum": ["é", 12, null]}'], r'"é"|12|null'),
        (["--json-schema", "FILE"], r'"é"|12|null'),
        (["--regex", "[a-f]{3}x"], r"[a-f]{3}x"),
        (["--choice", "yes", "--choice", "no"], r"yes|no"),
        (["--grammar", "LARK"], r"(ab)+c"),
    ],
    ids=str,
)
def test_an_answer_has_the_form_that_was_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, asked: list[str], matches: str
) -> None:
    (tmp_path / "FILE").write_text('{"enum": ["é", 12, null]}')
    (tmp_path / "LARK").write_text('start: ("ab")~1..5 "c"')
    given = [str(tmp_path / text) if (tmp_path / text).exists() else text for text in asked]
    sampled = ["--temperature", "1", "--max-tokens", "40", "-q"]
    status, out, _ = cli(capsys, "generate", "demo", "x", *given, *sampled)
    assert status == 0
    assert re.fullmatch(matches, out[:-1])


def test_a_seed_repeats_a_draw(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "generate",
        "demo",
        "The",
        "--temperature",
        "1",
        "--max-tokens",
        "12",
        "--ignore-eos",
        "-q",
        *FLAGS,
    ]
    first, again, other = (cli(capsys, *asked, "--seed", seed)[1] for seed in ("3", "3", "4"))
    assert first == again
    assert first != other


def test_sharding_resharding_and_exporting_give_the_source_back(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    from bireme.checkpoint.hub import resolve_model

    assert cli(capsys, "inspect", str(shards), "--check")[0] == 0
    assert cli(capsys, "shard", str(shards), str(tmp_path / "re"), "-tp", "3,1", "-q")[0] == 0
    assert cli(capsys, "export", str(tmp_path / "re"), str(tmp_path / "back"), "-q")[0] == 0
    demo = resolve_model("demo")
    names = sorted(path.name for path in demo.iterdir())
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == names
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (demo / name).read_bytes()


def test_an_artifact_runs_and_is_verified_and_keeps_its_certificate(
    capsys: pytest.CaptureFixture[str], shards: Path
) -> None:
    status, out, _ = cli(
        capsys,
        "verify",
        str(shards),
        "-tp",
        "3",
        *FLAGS,
        "--num-prompts",
        "2",
        "--num-decode",
        "4",
        "--json",
    )
    certificate = json.loads(out)
    assert status == 0
    assert certificate["is_same"] is True
    assert certificate["relative_difference"] < 1e-4
    kept = shards / "certificate-uncut-tp3-layers8-float32-cpu.json"
    assert json.loads(kept.read_text()) == certificate


def test_an_artifact_at_another_layout_says_what_was_read_of_it(
    capsys: pytest.CaptureFixture[str], shards: Path
) -> None:
    """Ranks of tp 3 need parts of what ranks of tp 2 hold: chunks are fetched and verified whole."""
    status, _, error = cli(capsys, "generate", str(shards), "The", "-tp", "3", "--max-tokens", "1")
    assert status == 0
    found = re.findall(r"read (\S+) MiB \(fetched (\S+) MiB, verified (\S+) MiB\) in \S+ s", error)
    assert len(found) == 3
    for needed, fetched, verified in found:
        assert float(needed) < float(fetched) == float(verified)


def test_verify_against_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = cli(
        capsys, "verify", "demo", "-tp", "2", "-pp", "2", *FLAGS,
        "--reference", "transformers", "--prompt", "The with statement", "--num-decode", "8",
    )  # fmt: skip
    assert status == 0
    assert "against transformers: the same model" in out
    assert "100.00% of decode" in out


def test_no_share_of_positions_is_told_where_there_are_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, _ = cli(capsys, "verify", "demo", "--num-prompts", "1", "--num-decode", "0")
    assert status == 0
    assert "100.00% of prefill" in out
    assert "of decode" not in out


def test_a_damaged_artifact_names_rank_layer_and_tensor(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "damaged"
    assert run(["shard", "demo", str(out), "-tp", "2", "--quiet"]) == 0
    from bireme.checkpoint.reader import SafetensorsFile

    name = "rank-00001-of-00002.safetensors"
    tensors = SafetensorsFile(out / name).tensors
    key = next(key for key in tensors if "layers.5.self_attn.o_proj" in key)
    data = bytearray((out / name).read_bytes())
    data[tensors[key].start + 7] ^= 4
    (out / name).write_bytes(bytes(data))
    status, found, _ = cli(capsys, "inspect", str(out), "--check")
    assert status == 1
    assert "rank 1, layer 5" in found
    assert key in found
    status, _, error = cli(capsys, "generate", str(out), "The", "-tp", "3")
    assert status == 2
    assert key in error


def test_inspect_needs_only_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 12288, "num_hidden_layers": 96,
        "num_attention_heads": 96, "ffn_dim": 49152, "vocab_size": 50272, "max_position_embeddings": 2048,
        "word_embed_proj_dim": 12288, "activation_function": "relu", "torch_dtype": "float16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, _ = cli(
        capsys, "inspect", str(tmp_path / "config.json"), "-tp", "8", "-pp", "4", "--json"
    )
    report = json.loads(out)
    assert status == 0
    assert len(report["ranks"]) == 32
    total = sum(rank["weight_bytes"] for rank in report["ranks"])
    assert 2 * 174e9 < total < 2 * 178e9
    status, out, _ = cli(capsys, "inspect", str(tmp_path), "-tp", "7", "-pp", "4")
    assert status == 0
    assert "query head (outputs)" in out


@pytest.mark.parametrize("command", [["inspect"], ["generate", "--load-format", "dummy"]])
def test_a_dtype_of_config_json_that_weights_cannot_have_is_refused(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from bireme.checkpoint.hub import resolve_model

    config = json.loads((resolve_model("demo") / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "int8"}))
    status, _, error = cli(capsys, *command, str(tmp_path), *["x"][: len(command) - 1])
    assert status == 2
    assert "dtype int8 is not supported; supported are float32, float16, bfloat16" in error


BAD = [
    (
        ["generate", "demo", "x", "-tp", "9"],
        "tensor_parallel_size=9 exceeds the 8 query heads; use at most 8",
    ),
    (
        ["generate", "demo", "x", "-pp", "9"],
        "pipeline_parallel_size=9 exceeds the 8 layers; use at most 8",
    ),
    (
        ["generate", "demo", "x", "--layers-per-stage", "3,3"],
        "sums to 6, but the model has 8 layers",
    ),
    (["generate", "demo", "x", "--layers-per-stage", "a,b"], "not a whole number"),
    (["inspect", "demo", "--layers-per-stage", ""], "layers_per_stage '' is not a whole number"),
    (["generate", "demo", "x", "--devices", ""], "devices '' is not a whole number"),
    (["generate", "demo", "x", "--memory-limit", ""], "memory size '' is not a size"),
    (["generate", "demo", "x", "--memory-limit", "24"], "memory size '24' has no unit"),
    (["generate", "demo", "x", "-tp", "two"], "not a whole number"),
    (["generate", "demo", "x", "-tp", "0"], "the smallest is 1"),
    (["generate", "demo", "x", "-tp", "Auto"], "auto takes the smallest width that fits"),
    (["inspect", "demo", "-tp", "auto"], "auto does not work here; give a number"),
    (["shard", "demo", "/tmp/x", "-tp", "auto"], "auto does not work here"),
    (["verify", "demo", "-tp", "auto"], "auto does not work here"),
    (["generate", "demo", ""], "prompt 0 is empty"),
    (["generate", "demo", "x", "a\udcff"], "prompt 1 holds half of a surrogate pair"),
    (["verify", "demo", "--prompt", ""], "prompt 0 is empty"),
    (["generate", "demo", "--prompts-file", "/dev/zero"], "neither a regular file nor a pipe"),
    (["generate", "demo", "--prompts-file", "/tmp"], "neither a regular file nor a pipe"),
    (["generate", "demo"], "no prompt was given"),
    (["generate", "demo", "x " * 2000], "the context holds 1024"),
    (
        ["generate", "demo", "x", "--max-tokens", "-3"],
        "max_tokens=-3 must be a whole number from 1",
    ),
    (["generate", "demo", "x", "--max-tokens", "abc"], "'abc'"),
    (["generate", "demo", "x", "--max-tokens", "2000"], "the context holds 1024"),
    (
        ["generate", "demo", "x", "--temperature", "-1"],
        "temperature=-1.0 must be a number from 0 to 100",
    ),
    (["generate", "demo", "x", "--n", "0"], "n=0 must be a whole number from 1 to 128"),
    (["generate", "demo", "x", "--min-p", "2"], "min_p=2.0 must be a number from 0 to 1"),
    (["generate", "demo", "x", "--min-tokens", "200"], "min_tokens=200 exceeds max_tokens=128"),
    (["generate", "demo", "x", "--stop", ""], "of 1 to 1024 characters each"),
    (["generate", "demo", "x", "--logprobs", "2"], "show with --json alone; add it"),
    (["generate", "demo", "x", "--logprobs", "21", "--json"], "a whole number from 0 to 20"),
    (["generate", "demo", "x", "--regex", "["], "unclosed character class"),
    (
        ["generate", "demo", "x", "--regex", "a", "--choice", "b"],
        "name regex, choice; give exactly",
    ),
    (["generate", "demo", "x", "--json-schema", '{"type": 5}'], "type must be a string"),
    (["generate", "demo", "x", "--json-schema", "/nonexistent"], "/nonexistent cannot be read"),
    (["generate", "demo", "x", "--grammar", "/dev/zero"], "neither a regular file nor a pipe"),
    (["generate", "demo", "x", "--grammar", "/etc/passwd"], "structured outputs: "),
    (["generate", "demo", "x", "--dtype", "int3"], "dtype 'int3' is not known"),
    (["generate", "demo", "x", "--memory-limit", "much"], "is not a size"),
    (["generate", "demo", "x", "--memory-limit", "1MiB"], "needs"),
    (["generate", "demo", "x", "--prompts-file", "/nonexistent.jsonl"], "cannot be read"),
    (["generate", "/nonexistent", "x"], "is no folder"),
    (["generate", "/tmp", "x"], "has no config.json"),
    (["generate", "/etc/passwd", "x"], "/etc/passwd is a file; give its folder, /etc"),
    (["generate", "demo", "x", "--wrong"], "No such option: --wrong"),
    (["inspect", "demo", "--check"], "is no sharded artifact; give a folder that `bireme shard`"),
    (["inspect", "/tmp", "--check"], "/tmp is no sharded artifact; give a folder"),
    (["inspect", "/nonexistent", "--check"], "is no folder"),
    (["verify", "demo", "--num-prompts", "0"], "num_prompts=0 must be at least 1"),
    (["verify", "demo", "--num-prompts", "65"], "exceeds 64; give --num-prompts at most 64"),
    (["verify", "demo", *["--prompt", "x"] * 65], "give it at most 64 times"),
    (["verify", "demo", "--reference", "magic"], "reference 'magic' is not known"),
    (["verify", "demo", "--num-decode", "2000"], "the context holds 1024"),
    (["verify", "demo", "--num-decode", "-1"], "num_decode=-1 must be at least 0"),
    (
        ["export", "/tmp", "/tmp/x"],
        "/tmp is no sharded artifact; give a folder that `bireme shard`",
    ),
    (["export", "/nonexistent", "/tmp/x"], "/nonexistent is no folder; give a folder that"),
    (["export", "/etc/passwd", "/tmp/x"], "/etc/passwd is a file; give a folder that"),
    (["shard", "demo", "/proc/x"], "/proc/x: No such file or directory"),
    (["generate", "demo", "x", "--trace", "/nonexistent/x.json"], "/nonexistent is no folder"),
    (["verify", "demo", "--out", "/nonexistent/x.json"], "/nonexistent is no folder"),
    (["verify", "demo", "--out", "/tmp"], "it is a folder; name a file in it"),
    (["verify", "demo", "--out", "/proc/x.json"], "/proc/x.json cannot be written"),
    (["nonsense"], "No such command"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(bad[0])[:50] for bad in BAD])
def test_bad_input_is_one_line_and_status_2_before_any_process_starts(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.setattr(WorkerPool, "take", None)
    status, out, error = cli(capsys, *arguments)
    assert status == 2
    assert says in error
    assert out == ""
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error


def test_a_checkpoint_with_a_missing_or_an_unknown_tensor_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from bireme.checkpoint.hub import resolve_model

    demo = resolve_model("demo")
    tensors = load_file(demo / "model.safetensors")
    for change, says in (
        ("missing", "lacks 1 of"),
        ("extra", "holds surprise.weight, which the model does not know"),
    ):
        folder = tmp_path / change
        folder.mkdir()
        for name in ("config.json", "tokenizer.json"):
            (folder / name).symlink_to(demo / name)
        changed = dict(tensors)
        if change == "missing":
            del changed["model.layers.3.mlp.up_proj.weight"]
        else:
            changed["surprise.weight"] = tensors["model.norm.weight"].clone()
        save_file(changed, folder / "model.safetensors")
        status, _, error = cli(capsys, "generate", str(folder), "x")
        assert status == 2
        assert says in error
        assert len(error.strip().splitlines()) == 1


def test_help_says_what_each_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = cli(capsys, "--help")
    assert status == 0
    for name in ("generate", "inspect", "shard", "export", "verify"):
        assert name in out
        status, said, _ = cli(capsys, name, "--help")
        assert status == 0
        assert ("auto takes the smallest fit" in " ".join(said.split())) == (name == "generate")
    assert "Exit status: 0; 1 where" in out
    said = cli(capsys, "generate", "--help")[1]
    assert "Of several prompts, each is printed whole when it ends." in said
    assert cli(capsys, "--version")[1].startswith("bireme ")
