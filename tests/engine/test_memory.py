"""The bytes that a rank is said to need are the bytes that its process takes.

Peaks are those of the resident set, counted from when the process has run another model; float32,
for oneDNN keeps scratch memory of its own in the smaller types.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bireme import LLM, SamplingParams
from bireme.engine.budget import memory_of
from bireme.engine.pool import RankProcess, WorkerPool
from bireme.models.registry import model_layout

MIB = 1024 * 1024
VOCAB, PROMPT, NEW, NUM_SEQS = 16000, 1500, 4, 4

_SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 8, "max_position_embeddings": 1536,
}  # fmt: skip
LLAMA = {**_SHAPE, "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2}
GEMMA2 = {
    **_SHAPE, "architectures": ["Gemma2ForCausalLM"], "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
BLOOM = {
    "architectures": ["BloomForCausalLM"], "vocab_size": VOCAB, "hidden_size": 512, "n_layer": 4,
    "n_head": 8, "seq_length": 1536,
}  # fmt: skip


def status(rank: RankProcess, field: str) -> int:
    """Bytes of one line of the process's status."""
    lines = Path(f"/proc/{rank.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "tp", "pp"), [(LLAMA, 3, 1), (GEMMA2, 1, 1), (BLOOM, 1, 2)],
    ids=["llama-tp3", "gemma2", "bloom-pp2"],
)  # fmt: skip
def test_a_rank_takes_what_it_is_said_to_need(
    shape: dict[str, Any], tp: int, pp: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shape))
    settings: dict[str, Any] = {
        "tensor_parallel_size": tp, "pipeline_parallel_size": pp, "dtype": "float32",
    }  # fmt: skip
    draw = random.Random(0)
    prompts = [[draw.randrange(VOCAB) for _ in range(PROMPT)] for _ in range(NUM_SEQS)]
    with WorkerPool() as pool:
        with LLM("demo", pool=pool, max_num_seqs=1, memory_limit_bytes=96 * MIB, **settings) as llm:
            llm.generate("The with statement", SamplingParams(max_tokens=2))
        ranks = pool.take(tp * pp)
        before = [status(rank, "VmRSS") for rank in ranks]
        llm = LLM(
            tmp_path, pool=pool, load_format="dummy", max_num_seqs=NUM_SEQS, max_model_len=1536,
            memory_limit_bytes=600 * MIB, **settings,
        )  # fmt: skip
        with llm:
            llm.generate(prompts, SamplingParams(top_p=0.9, max_tokens=NEW, ignore_eos=True))
            taken = [status(rank, "VmHWM") - base for rank, base in zip(ranks, before, strict=True)]
    layout = model_layout(llm.model.config, llm.config.parallel)
    for memory, num_bytes in zip(
        memory_of(llm.model.config, layout, llm.config, "float32"), taken, strict=True
    ):
        said = memory.total(NUM_SEQS * (PROMPT + NEW))
        # the peak varies by 20 MiB from run to run
        assert 0.7 * said < num_bytes < 1.1 * said + 32 * MIB, (num_bytes / MIB, said / MIB)
