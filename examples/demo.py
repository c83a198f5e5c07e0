"""A real (small) language model on four processes, with proof that it is the whole model.

Run by `scripts/demo`. Everything happens in this program and its rank processes; each step shows
the command that does the same.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bireme import LLM, SamplingParams
from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.opener import match_source, open_folder
from bireme.checkpoint.prepared import PreparedModel, prepare_model
from bireme.checkpoint.reader import SafetensorsFile
from bireme.checkpoint.sharder import shard
from bireme.config import EngineConfig, ParallelConfig, format_bytes
from bireme.engine.pool import WorkerPool
from bireme.errors import CapacityError
from bireme.models.registry import model_layout
from bireme.verify import certificate_text, verify

QUESTION = "What does textwrap.dedent do?"
LIMITS: dict[str, Any] = {
    "dtype": "float32",
    "memory_limit_bytes": 12 * 1024 * 1024,
    "max_num_batched_tokens": 256,
}
FLAGS = "--dtype float32 --memory-limit 12MiB --max-num-batched-tokens 256"
LAYOUT = ParallelConfig.of(2, 2)


def heading(number: int, text: str, command: str) -> None:
    print(f"\n[{number}] {text}\n    $ {command}", flush=True)


def refuse_on_one_rank() -> None:
    heading(
        1,
        "One rank with 12 MiB is too small for it",
        f'bireme generate demo --chat "{QUESTION}" {FLAGS}',
    )
    try:
        LLM("demo", **LIMITS)
    except CapacityError as refusal:
        print(f"    bireme: {refusal}")
    else:
        sys.exit("the model was not refused on one rank")


def answer_on_four_ranks(pool: WorkerPool) -> None:
    heading(
        2,
        f"The same limit on four ranks, {LAYOUT}",
        f'bireme generate demo --chat "{QUESTION}" {FLAGS} -tp 2 -pp 2',
    )
    with LLM("demo", tensor_parallel_size=2, pipeline_parallel_size=2, pool=pool, **LIMITS) as llm:
        ids = llm.chat_ids([{"role": "user", "content": QUESTION}])
        print("    ", end="")
        for delta in llm.stream([ids], SamplingParams(temperature=0, max_tokens=128)):
            print(delta.text.replace("\n", "\n    "), end="", flush=True)
        print()
        for name, loaded in zip(llm.plan.rank_names, llm.loaded, strict=True):
            weights, cache = format_bytes(loaded.weight_bytes), format_bytes(loaded.cache_bytes)
            print(f"    {name}: weights {weights}, cache {cache}")


def prove(model: PreparedModel, pool: WorkerPool) -> None:
    heading(
        3, "Proof that the four are the whole", "bireme verify demo -tp 2 -pp 2 --dtype float32"
    )
    config = EngineConfig(parallel=LAYOUT, dtype="float32")
    prompts = [list(range(start, start + 24)) for start in (100, 700)]
    certificate = verify(model, config, prompts, num_decode=16, pool=pool)
    print("    " + certificate_text(certificate).replace("\n", "\n    "))
    if not certificate.is_same:
        sys.exit("the cut model is not the whole model")


def catch_damage(model: PreparedModel, folder: Path) -> None:
    heading(
        4,
        "A sharded copy, damaged in one place, and the check that finds it",
        "bireme shard demo shards -tp 2 -pp 2 && bireme inspect shards --check",
    )
    layout, source = model_layout(model.config, LAYOUT), open_folder(model.folder)
    names = match_source(source, layout, model.config)
    shard(source, folder, layout, names)
    damaged = next(folder.glob("rank-00003-*.safetensors"))
    tensors = SafetensorsFile(damaged).tensors
    key = next(key for key in tensors if ".6.mlp.down_proj" in key)
    at = tensors[key].start + 1000
    with damaged.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    findings = Artifact(folder).check()
    print(f"    one bit of {damaged.name} flipped:")
    for finding in findings:
        print("    " + finding.replace(f"{folder}/", ""))
    if len(findings) != 1 or key not in findings[0]:
        sys.exit("the damage was not found")


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="bireme-demo-"))
    try:
        refuse_on_one_rank()
        model = prepare_model("demo")
        with WorkerPool() as pool:
            answer_on_four_ranks(pool)
            prove(model, pool)
        catch_damage(model, folder / "shards")
    finally:
        shutil.rmtree(folder)
    print("\nTry next (the command is .venv/bin/bireme):")
    print('    bireme generate demo --chat "What does os.path.join do?" -tp 3 --trace trace.json')
    print("    bireme inspect demo -tp 3,2")
    print("    bireme verify demo -tp 8 --dtype float32")


if __name__ == "__main__":
    main()
