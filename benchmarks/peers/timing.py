"""What all peers are asked, in environments of their own that may lack everything else here.

Of a batch of prompts it is asked how long tokens take that are continued by so many; a step is the difference between
a long and a short generation, over the tokens between them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

SHORT = 8  # tokens
MOST_ID = 31000
_TOLD = ("VLLM_USE_", "VLLM_ALLREDUCE_", "VLLM_CPU_", "NCCL_", "TORCH_SYMM_MEM_")  # no keys

Generate = Callable[[list[list[int]], int], object]  # prompts, and new tokens of each


def asked_for(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="a folder with a config.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layout", default="1,1", help="tp,pp")
    parser.add_argument("--batches", default="")
    parser.add_argument("--prefills", default="", help="lengths of prompts")
    parser.add_argument("--load", default="", help="requests,tokens in,tokens out")
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, for its model")
    parser.add_argument(
        "--ends-with-stdin",
        action="store_true",
        help="with its process group, once stdin is closed",
    )
    asked = parser.parse_args()
    if asked.ends_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    return asked


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def prompts(count: int, length: int) -> list[list[int]]:
    """No two that begin alike, so that no cache of prefixes helps."""
    return [[(7 * row + 3 * at + 1) % MOST_ID for at in range(length)] for row in range(count)]


def seconds(generate: Generate, given: list[list[int]], num_tokens: int) -> float:
    start = time.perf_counter()
    generate(given, num_tokens)
    return time.perf_counter() - start


def measured(asked: argparse.Namespace, generate: Generate) -> dict[str, Any]:
    """Seconds of a step by batch, of each round after one that does not count; to the first token by length of a
    prompt, of three times as many after as many that do not count; of a load all at once, after its prompts alone."""
    found: dict[str, Any] = {"step_s": {}, "first_token_s": {}}
    for batch in numbers(asked.batches):
        given = prompts(batch, asked.input_len)
        for num_tokens in (SHORT, SHORT + asked.tokens):
            seconds(generate, given, num_tokens)
        found["step_s"][batch] = [
            (seconds(generate, given, SHORT + asked.tokens) - seconds(generate, given, SHORT))
            / asked.tokens
            for _ in range(asked.rounds)
        ]
    for length in numbers(asked.prefills):
        given, count = prompts(1, length), 3 * asked.rounds
        for _ in range(count):  # some engines take several to settle
            seconds(generate, given, 1)
        found["first_token_s"][length] = [seconds(generate, given, 1) for _ in range(count)]
    if asked.load:
        count, input_len, output_len = numbers(asked.load)
        generate(prompts(count, input_len), SHORT)
        found["output_tokens_per_s"] = [
            count * output_len / seconds(generate, prompts(count, input_len), output_len)
            for _ in range(asked.rounds)
        ]
    return found


def tell(found: dict[str, Any], packages: Sequence[str], **own: str) -> None:
    """A line of JSON, the last one; with versions of installed packages, and of what says its own, and what variables
    of the environment turn on or off."""
    versions = {**{name: version(name) for name in packages}, **own}
    told = {name: value for name, value in os.environ.items() if name.startswith(_TOLD)}
    print(json.dumps({**found, "versions": versions, "environment": told}), flush=True)
