"""What HTTP adds to the engine, in one run.

    python benchmarks/serving.py [--rounds 3] [--transformers PYTHON]

In turn, `--rounds` times: tokens/s of 64 clients at once, over HTTP (streamed, `bireme bench serve`)
and of the same engine in process (`AsyncLLM`); a Llama of 8 layers, hidden 1024, and the demo model,
which takes so little that what is said of its tokens takes as much; prompts of 32 tokens, 64 more.
Then, against the real front end before an engine of known tokens: the time that 100 requests a second
of 64 tokens in and 16 out take, which is all added; and what 500 streams that wait cost in CPU.
First of all the time from a command to its first reply, `bireme serve demo` beside `transformers
serve`, by a Python that has transformers[serving].
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import command_line
import psutil
import record

import bireme
from bireme import AsyncLLM, SamplingParams

HERE = Path(__file__).parent
DEMO = Path(bireme.__file__).parent / "assets" / "demo"
BIREME = [sys.executable, "-m", "bireme"]
CLIENTS, INPUT, OUTPUT, REQUESTS = 64, 32, 64, 256
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
IDLE_STREAMS, IDLE_S = 500, 5.0
BODY = {"messages": [{"role": "user", "content": "What does textwrap.dedent do?"}], "max_tokens": 8}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str], port: int, path: str = "/health", **environment: str
) -> Iterator[int]:
    """A server's process id, once it is ready; ended afterwards."""
    process = subprocess.Popen(
        command, env=os.environ | environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        until(lambda: get(port, path) == 200, process)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def until(is_so: Any, process: subprocess.Popen[bytes]) -> None:
    while not is_so():
        assert process.poll() is None, "the server ended"
        time.sleep(0.01)


# --- 64 clients ------------------------------------------------------------------------------------


def over_http(port: int, *more: str) -> dict[str, Any]:
    done = subprocess.run(
        [*BIREME, "bench", "serve", "--base-url", f"http://127.0.0.1:{port}", "--json", *more],
        check=True,
        capture_output=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["failed"] == 0, result
    return result


def clients_over_http(port: int, seed: int) -> float:
    result = over_http(
        port, "--max-concurrency", str(CLIENTS), "--num-prompts", str(REQUESTS), "--input-len",
        str(INPUT), "--output-len", str(OUTPUT), "--num-warmups", "8", "--seed", str(seed),
    )  # fmt: skip
    return float(result["output_throughput"])


async def clients_in_process(llm: AsyncLLM, seed: int) -> float:
    draw = random.Random(seed)
    left = [[draw.randrange(256) for _ in range(INPUT)] for _ in range(REQUESTS)]
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)

    async def client() -> None:
        while left:
            async for _ in llm.stream(left.pop(), params):
                pass

    start = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(CLIENTS)])
    return REQUESTS * OUTPUT / (time.perf_counter() - start)


async def in_process(model: str, seed: int, **settings: Any) -> float:
    async with AsyncLLM(model, max_num_seqs=CLIENTS, **settings) as llm:
        await clients_in_process(llm, 0)
        return await clients_in_process(llm, seed)


def throughput(model: str, num_rounds: int, load_format: str = "auto") -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {"over HTTP": [], "in process": []}
    for seed in range(1, num_rounds + 1):
        port = free_port()
        command = [*BIREME, "serve", model, "--port", str(port), "--load-format", load_format]
        with running([*command, "--no-log-requests"], port):
            clients_over_http(port, 0)
            rates["over HTTP"].append(clients_over_http(port, seed))
        rates["in process"].append(asyncio.run(in_process(model, seed, load_format=load_format)))
    return rates


def shape(folder: Path) -> str:
    """A model of known shape, with the demo's tokenizer: made-up weights do."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return str(folder)


def all_throughputs(num_rounds: int) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        rates = {
            "Llama 8x1024": throughput(shape(Path(folder)), num_rounds, "dummy"),
            "demo": throughput("demo", num_rounds),
        }
    found = {}
    for name, sides in rates.items():
        medians = {side: statistics.median(each) for side, each in sides.items()}
        ratio = medians["over HTTP"] / medians["in process"]
        shown = ", ".join(f"{side} {rate:.0f} tokens/s" for side, rate in medians.items())
        print(f"{CLIENTS} clients, {name}: {shown}; {ratio:.3f}")
        found[name] = {"tokens_per_s": sides, "http_over_in_process": ratio}
    return found


# --- an engine of known tokens -----------------------------------------------------------------------


def scripted(port: int) -> list[str]:
    return [sys.executable, str(HERE / "scripted_server.py"), str(port)]


def added_latency() -> dict[str, float]:
    """Milliseconds from sending a request to its last token; of an engine that takes no time."""
    port = free_port()
    with running(scripted(port), port):
        result = over_http(
            port, "--request-rate", "100", "--num-prompts", "1000", "--input-len", "64",
            "--output-len", "16", "--num-warmups", "50",
        )  # fmt: skip
    keys = ("mean_ttft_ms", "p99_ttft_ms", "median_e2el_ms", "p90_e2el_ms", "p99_e2el_ms")
    return {key: result[key] for key in (*keys, "generator_cpu_share", "max_lag_ms")}


async def open_streams(port: int) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    body = json.dumps({"prompt": [5] * 64, "max_tokens": 16, "stream": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    streams = []
    for _ in range(IDLE_STREAMS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        await writer.drain()
        streams.append((reader, writer))
    return streams


async def idle_cpu(port: int, pid: int) -> dict[str, float]:
    """Seconds of CPU a second, of the front end and its engine, while no stream gets a token."""
    streams = await open_streams(port)
    while await asyncio.to_thread(load, port) < IDLE_STREAMS:
        await asyncio.sleep(0.05)
    front_end = psutil.Process(pid)
    processes = {"front end": front_end, "engine": front_end.children()[0]}
    before = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
    await asyncio.sleep(IDLE_S)
    shares = {
        name: (sum(process.cpu_times()[:2]) - before[name]) / IDLE_S
        for name, process in processes.items()
    }
    for _, writer in streams:
        writer.close()
    return shares


def load(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/load")
    found: Mapping[str, int] = json.loads(connection.getresponse().read())
    connection.close()
    return found["server_load"]


def idle_streams() -> dict[str, float]:
    port = free_port()
    with running(scripted(port), port, BIREME_STALLED="1") as pid:
        return asyncio.run(idle_cpu(port, pid))


# --- the first reply -----------------------------------------------------------------------------------


def first_reply_s(command: Sequence[str], port: int, model: str) -> float:
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            until(lambda: ask(port, model), process)
            return time.perf_counter() - start
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def ask(port: int, model: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        body = json.dumps({"model": model, **BODY})
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        return response.status == 200 and bool(response.read())
    except OSError:
        return False
    finally:
        connection.close()


def first_replies(num_rounds: int, transformers: str | None) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"bireme serve": []}
    if transformers:
        found["transformers serve"] = []
    for _ in range(num_rounds):
        port = free_port()
        command = [*BIREME, "serve", "demo", "--port", str(port)]
        found["bireme serve"].append(first_reply_s(command, port, "demo"))
        if transformers:
            port = free_port()
            command = [
                transformers, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1",
                "--port", str(port), "--device", "cpu", str(DEMO),
            ]  # fmt: skip
            found["transformers serve"].append(first_reply_s(command, port, str(DEMO)))
    return found


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transformers", metavar="PYTHON")
    arguments = parser.parse_args()
    first = first_replies(arguments.rounds, arguments.transformers)
    print("first reply:", {name: f"{statistics.median(it):.2f} s" for name, it in first.items()})
    added = added_latency()
    print("100 requests/s, known tokens:", {name: round(ms, 2) for name, ms in added.items()})
    idle = idle_streams()
    print(f"{IDLE_STREAMS} idle streams:", {name: f"{share:.2%}" for name, share in idle.items()})
    rates = all_throughputs(arguments.rounds)
    record.write(
        "serving",
        ["bireme", "torch", "fastapi", "uvicorn", "uvloop", "httptools", "aiohttp", "transformers"],
        {
            "first_reply_s": first,
            "added_ms_at_100_requests_per_s": added,
            "idle_cpu_share": idle,
            "clients": rates,
        },
    )


if __name__ == "__main__":
    main()
