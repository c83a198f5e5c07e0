"""What no program on a GPU is quicker than: bytes by the rate at which memory is read, operations by that of a large
product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bireme import LLM

NO_CACHE_BYTES = 400 << 20  # more than a GPU's own cache holds
CONFIGS = Path(__file__).parent.parent / "examples" / "configs"


def model_folder(model: str) -> str:
    """Of a name in `examples/configs`, or of a folder itself."""
    return str(CONFIGS / model if (CONFIGS / model).is_dir() else model)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _seconds(run: Callable[[], object], times: int = 10) -> float:
    """Of one of so many in a row, after one that does not count."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    run()
    marks[0].record()
    for _ in range(times):
        run()
    marks[1].record()
    torch.cuda.synchronize()
    return float(marks[0].elapsed_time(marks[1])) / 1e3 / times


def memory_rates() -> dict[str, float]:
    """Bytes a second of one GPU: read by a sum of 4 GiB, and read and written by a copy of 1 GiB."""
    numbers = torch.ones(1 << 30, device="cuda")
    rates = {"read_bytes_per_s": numbers.nbytes / _seconds(numbers.sum)}
    source = torch.randn(1 << 29, device="cuda").half()
    target = torch.empty_like(source)
    rates["copy_bytes_per_s"] = 2 * source.nbytes / _seconds(lambda: target.copy_(source))
    return rates


def flop_per_s() -> float:
    """Of a product of two large matrices in bfloat16."""
    x = torch.randn(8192, 8192, device="cuda").bfloat16()
    return 2 * 8192**3 / _seconds(lambda: x @ x)


def read_bytes(llm: LLM, num_together: int, context: int = 0) -> int:
    """Of all stages, in a step of so many requests that decode, with so many tokens of context each."""
    config = llm.model.config
    weights = sum(loaded.weight_bytes for loaded in llm.executor.loaded)
    embedding = 2 * config.vocab_size * config.hidden_size
    token = 4 * config.num_layers * config.num_kv_heads * config.head_dim
    return weights - embedding + num_together * (context) * token


def prefill_flop(llm: LLM, num_tokens: int) -> int:
    """Two an element of the weights and token, the head's for the last one alone, and causal attention's."""
    head = llm.model.config.vocab_size * llm.model.config.hidden_size
    products = (read_bytes(llm, 0) - 2 * head) * num_tokens + 2 * head
    return products + attention_flop(llm, num_tokens)


def attention_flop(llm: LLM, num_tokens: int) -> int:
    """Causal, of one prompt."""
    config = llm.model.config
    return 2 * config.num_layers * config.num_heads * config.head_dim * num_tokens**2


def microseconds(run: Callable[[torch.Tensor], object], tensors: Sequence[torch.Tensor]) -> float:
    """Of a run with one tensor, in a CUDA graph of runs with each of them, three times: with enough of them none is in
    a cache."""
    run(tensors[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensor in tensors:
            run(tensor)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    graph.replay()
    marks[0].record()
    for _ in range(3):
        graph.replay()
    marks[1].record()
    torch.cuda.synchronize()
    return float(marks[0].elapsed_time(marks[1])) * 1e3 / 3 / len(tensors)
