"""`bireme bench serve` against a server that does as it is told."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_server import ScriptedServer, serving

from bireme.cli import run

VLLM_KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts",
    "request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed",
    "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests",
}  # fmt: skip
DETAILS = {
    "input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times",
    "generated_texts", "errors",
}  # fmt: skip
LABELS = [
    "Successful requests:", "Failed requests:", "Benchmark duration (s):", "Total input tokens:",
    "Total generated tokens:", "Request throughput (req/s):", "Request goodput (req/s):",
    "Output token throughput (tok/s):", "Peak output token throughput (tok/s):",
    "Peak concurrent requests:", "Total token throughput (tok/s):", "Mean TTFT (ms):",
    "Median TTFT (ms):", "P90 TTFT (ms):", "P99 TTFT (ms):", "Mean TPOT (ms):", "Mean ITL (ms):",
    "Mean E2EL (ms):", "Per 1,000 queries:", "Per million tokens:", "CPU (% of a core):",
    "Max lag of sending (ms):",
]  # fmt: skip
SMALL = ["--input-len", "6", "--output-len", "4"]


def bench(
    capsys: pytest.CaptureFixture[str], server: ScriptedServer, *arguments: str
) -> tuple[int, dict[str, Any], str]:
    """(exit status, the JSON, standard error)."""
    status = run(["bench", "serve", "--base-url", server.url, *SMALL, "--json", *arguments])
    captured = capsys.readouterr()
    return status, json.loads(captured.out), captured.err


def test_json_has_the_keys_of_vllm_and_counts_what_the_server_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(ScriptedServer()) as server:
        status, found, _ = bench(
            capsys, server, "--num-prompts", "5", "--save-detailed", "--price-per-device-hour", "2"
        )
    assert status == 0
    spread = {
        f"{name}_{metric}_ms"
        for name in ("mean", "median", "std", "p90", "p99")
        for metric in ("ttft", "tpot", "itl", "e2el")
    }
    own = {"arrival", "generator_cpu_share", "cost_per_1000_queries", "cost_per_million_tokens"}
    assert VLLM_KEYS | DETAILS | spread | own <= set(found)
    assert (found["completed"], found["failed"], found["model_id"]) == (5, 0, "scripted")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 20)
    assert [len(gaps) for gaps in found["itls"]] == [3] * 5
    assert found["generated_texts"] == ["w w w w "] * 5
    assert found["start_times"] == sorted(found["start_times"])


def test_a_request_says_what_the_options_say(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(ScriptedServer()) as server:
        bench(
            capsys, server, "--num-prompts", "1", "--model", "m", "--temperature", "0", "--api-key",
            "k", "--header", "x-a=1=2", "--extra-body", '{"priority": 3}', "--vocab-size", "9",
        )  # fmt: skip
    [body], [headers] = server.bodies, server.headers
    prompt = body.pop("prompt")
    assert len(prompt) == 6
    assert max(prompt) < 9
    assert body == {
        "model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4,
        "temperature": 0, "ignore_eos": True, "priority": 3,
    }  # fmt: skip
    assert (headers["Authorization"], headers["x-a"]) == ("Bearer k", "1=2")


def test_a_chat_is_asked_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(ScriptedServer()) as server:
        status, found, _ = bench(capsys, server, "--num-prompts", "2", "--backend", "openai-chat")
    assert status == 0
    assert [len(body["messages"][0]["content"].split()) for body in server.bodies] == [6, 6]
    assert found["total_input_tokens"] == 10  # as the server says, with its template


def test_the_text_is_laid_out_as_that_of_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(ScriptedServer()) as server:
        status = run(
            ["bench", "serve", "--base-url", server.url, *SMALL, "--num-prompts", "3", "--goodput",
             "ttft:5000", "e2el:9000", "--price-per-device-hour", "2.5", "--num-devices", "4"]
        )  # fmt: skip
    out = capsys.readouterr().out
    assert status == 0
    assert out.startswith("============ Serving Benchmark Result ============\n")
    places = [out.index(label) for label in LABELS]
    assert places == sorted(places)
    assert "Successful requests:                     3\n" in out


def test_an_open_loop_sends_all_although_no_answer_comes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(ScriptedServer(num_held=30)) as server:
        status, found, _ = bench(
            capsys,
            server,
            "--num-prompts",
            "30",
            "--request-rate",
            "500",
            "--request-timeout",
            "60",
        )
    assert status == 0
    assert found["completed"] == found["max_concurrent_requests"] == 30
    assert (found["arrival"], found["request_rate"]) == ("poisson", 500)


def test_a_closed_loop_keeps_its_concurrency_and_never_exceeds_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(ScriptedServer(num_held=3)) as server:
        status, found, _ = bench(capsys, server, "--num-prompts", "12", "--max-concurrency", "3")
    assert (status, found["completed"], found["arrival"]) == (0, 12, "closed")
    assert server.most_open == 3


def test_failed_requests_are_counted_and_the_first_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(ScriptedServer(refuse_every=3, cut_every=4)) as server:
        status, found, err = bench(
            capsys, server, "--num-prompts", "8", "--max-concurrency", "1", "--save-detailed"
        )
    assert status == 0
    assert (found["completed"], found["failed"]) == (4, 4)
    assert found["errors"][2] == "400 Bad Request: request 3 is refused"
    assert found["errors"][3] == "the answer was cut off after 3 pieces"
    assert found["output_lens"] == [4, 4, 0, 0, 4, 0, 4, 0]
    assert "4 of 8 requests failed; the first: 400 Bad Request: request 3 is refused" in err


def test_when_all_requests_fail_the_exit_status_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(ScriptedServer(refuse_every=1)) as server:
        status, found, _ = bench(capsys, server, "--num-prompts", "3")
    assert (status, found["completed"], found["mean_ttft_ms"]) == (1, 0, None)


def test_warm_up_requests_come_first_and_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(ScriptedServer()) as server:
        _, found, _ = bench(capsys, server, "--num-prompts", "2", "--num-warmups", "3")
    assert (len(server.bodies), found["completed"]) == (5, 2)
    assert len({json.dumps(body["prompt"]) for body in server.bodies}) == 5


def test_when_no_warm_up_request_succeeds_nothing_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(ScriptedServer(refuse_every=1)) as server:
        status = run(["bench", "serve", "--base-url", server.url, "--num-warmups", "2"])
    assert status == 1
    assert "all 2 warm-up requests failed; the first: 400 Bad" in capsys.readouterr().err
    assert len(server.bodies) == 2


def test_a_server_that_does_not_count_has_its_pieces_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(ScriptedServer(usage=False)) as server:
        _, found, _ = bench(capsys, server, "--num-prompts", "2")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (12, 8)


def test_a_trace_is_replayed_with_its_lengths(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97996,20,2\n"
        "2023-11-16 18:17:04.17996,300,3\n2023-11-16 18:17:04.27996,5,7\n"
    )
    with serving(ScriptedServer()) as server:
        _, found, _ = bench(
            capsys, server, "--trace-file", str(path), "--trace-speed", "10", "--max-model-len",
            "100", "--save-detailed",
        )  # fmt: skip
    assert (found["arrival"], found["num_prompts"], found["num_cut"]) == ("trace", 3, 1)
    assert found["input_lens"] == [20, 97, 5]
    assert found["output_lens"] == [2, 3, 7]
    assert found["start_times"][2] >= 0.03


def test_a_file_of_prompts_is_sent_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two", "output_len": 2}\n')
    with serving(ScriptedServer()) as server:
        _, found, _ = bench(capsys, server, "--dataset-path", str(path), "--dataset-name", "custom")
    sent = [(body["prompt"], body["max_tokens"]) for body in server.bodies]
    assert sorted(sent) == [("one", 4), ("two", 2)]
    assert "ignore_eos" not in server.bodies[0]
    assert found["total_output_tokens"] == 6


def test_the_result_is_kept_in_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = [
        "--num-prompts",
        "2",
        "--result-dir",
        str(tmp_path),
        "--result-filename",
        "out.json",
    ]
    with serving(ScriptedServer()) as server:
        _, printed, _ = bench(capsys, server, *arguments)
        assert json.loads(path.read_text()) == printed
        assert bench(capsys, server, *arguments)[0] == 0
        path.write_text('{"mine": 1}')
        assert run(["bench", "serve", "--base-url", server.url, *arguments]) == 2
    assert "out.json is there and is no result of ours" in capsys.readouterr().err


def test_ctrl_c_ends_it_with_what_was_measured() -> None:
    with serving(ScriptedServer(num_held=5)) as server:
        server._let_go.set()
        process = subprocess.Popen(
            [sys.executable, "-m", "bireme", "bench", "serve", "--base-url", server.url, *SMALL,
             "--num-prompts", "100000", "--max-concurrency", "2", "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert server.have_come.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    found = json.loads(out)
    assert 0 < found["completed"] < 100_000
    assert found["failed"] == 0
    assert "interrupted" in err


def test_a_generator_does_not_import_torch() -> None:
    probe = (
        "import sys, bireme.cli.bench_serve, bireme.bench.client, bireme.bench.serving_metrics\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    command = ["bench", "serve", "--port", str(port)]
    assert run([*command, "--ready-check-timeout-sec", "0.1"]) == 2
    told = capsys.readouterr().err
    assert f"nothing answers at http://127.0.0.1:{port}: connection refused; start" in told
    assert run([*command, "--model", "m"]) == 1
    told = capsys.readouterr().err
    assert f"the first: nothing answers at http://127.0.0.1:{port}: connection refused" in told


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--base-url", "localhost:8000"], "must begin with http:// or https://"),
        (["--endpoint", "/v1/embeddings"], "must end with /completions"),
        (["--backend", "tgi"], "backend='tgi' must be one of openai, vllm, openai-chat"),
        (["--backend", "openai-chat", "--endpoint", "/v1/completions"], "is none of openai-chat"),
        (["--num-prompts", "0"], "num_prompts=0 must be at least 1"),
        (["--max-concurrency", "0"], "max_concurrency=0 must be at least 1"),
        (["--request-rate", "0"], "request_rate=0.0 must be above 0"),
        (["--arrival", "constant"], "--arrival constant needs a rate"),
        (["--arrival", "constant", "--request-rate", "1", "--burstiness", "2"], "shapes gamma"),
        (["--goodput", "ttft"], "goodput='ttft' has no limit; write METRIC:MS"),
        (["--goodput", "itl:5"], "goodput: 'itl' is none of ttft, tpot, e2el"),
        (["tpot:5"], "'tpot:5' stands alone; objectives follow --goodput"),
        (["--metric-percentiles", "9x"], "metric_percentiles: '9x' is no number"),
        (["--header", "novalue"], "header='novalue' has no =; write KEY=VALUE"),
        (["--extra-body", "[1]"], "extra_body='[1]' is no JSON object"),
        (["--dataset-name", "sharegpt"], "must be one of random, custom"),
        (["--dataset-name", "custom"], "name --dataset-file"),
        (["--dataset-file", "/nowhere.jsonl"], "/nowhere.jsonl: No such file"),
        (["--trace-file", "/nowhere.csv"], "/nowhere.csv: No such file"),
        (["--max-model-len", "5"], "cuts requests of a --trace-file alone"),
        (["--random-range-ratio", "1"], "range_ratio=1.0 must be at least 0 and below 1"),
        (["--request-timeout", "0"], "request_timeout=0.0 must be above 0 s"),
        (["--trace-speed", "0"], "trace_speed=0.0 must be above 0"),
    ],
)
def test_what_cannot_work_is_refused_on_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert run(["bench", "serve", *arguments]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1
