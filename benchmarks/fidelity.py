"""How faithful the fast paths are: to the model in float32, to kernels that are launched one by one, and, where
determinism is asked for, to themselves, with what that costs.

    python benchmarks/fidelity.py --name 2x-h200 [--device cuda] [--layouts 1,1 2,1 1,2] [--prompts 64] [--tokens 64]
        [--shape llama-2-7b] [--devices 0,0]

`demo` in bfloat16, with the first words of paragraphs of this project's guide as prompts. For each layout: logits
beside transformers' in float32, of prompts and of 32 tokens after each; answers of all prompts together beside those
of `enforce_eager`, and beside those of requests that ask for their prompts' log-probabilities too, so that the last
layer makes all rows, as it does for the logits; with `deterministic`, the logits of every token of 8 requests
together, one of them of 900 tokens, bit by bit, beside those of each alone and of smaller steps, and the time from
token to token of 8 requests beside the usual one. With `--shape`, logits of that shape with made-up weights too,
beside those of one rank in float32: of prompts of 40 to 1,100 tokens in chunks of at most 512, and of 32 tokens after
each; and what `deterministic` costs there, from token to token of 8 requests, and to the first token of a prompt of
1,024. Ranks that share a GPU, as `--devices 0,0` has them where NCCL and torch were told to allow it, make the same
numbers; their times say nothing, and are not told.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import command_line
import numpy as np
import record
from gpu_floors import model_folder, numbers
from logit_rows import Rows, logit_rows

from bireme import LLM, SamplingParams
from bireme.bench.answer_times import Latencies
from bireme.bench.throughput import measure_throughput
from bireme.bench.workload import Workload
from bireme.checkpoint.prepared import PreparedModel, prepare_model
from bireme.config import EngineConfig, ParallelConfig
from bireme.engine.prepare import make_plan
from bireme.errors import UserError
from bireme.text.tokenizer import Tokenizer
from bireme.verify import (
    Certificate,
    Reference,
    transformers_reference,
    uncut_reference,
    verify,
)

MODEL = "demo"
DType = Literal["bfloat16", "float32"]
DTYPE: DType = "bfloat16"
GUIDE = Path(__file__).parent.parent / "docs" / "guide"
MOST_PROMPT_TOKENS = 40
LONGEST_TOKENS = 900  # of one prompt, which attention goes through in many parts
SHAPE_PROMPTS = (40, 600, 1100)  # tokens
LONG_PROMPT = 1024  # tokens
Answers = list[list[int]]


def paragraphs(count: int) -> list[str]:
    found = [
        part
        for path in sorted(GUIDE.glob("*.md"))
        for part in path.read_text().split("\n\n")
        if len(part) > 100 and part[0].isalpha()
    ]
    if len(found) < count:
        raise ValueError(f"the guide has {len(found)} paragraphs; {count} were asked for")
    return found[:count]


def settings(asked: argparse.Namespace, layout: str, **more: Any) -> dict[str, Any]:
    tp, pp = numbers(layout)
    return {
        "model": MODEL, "device": asked.device, "dtype": DTYPE, "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp, "devices": devices_of(asked, layout),
        "enable_prefix_caching": False, **more,
    }  # fmt: skip


def devices_of(asked: argparse.Namespace, layout: str) -> tuple[int, ...] | None:
    return asked.devices and tuple(asked.devices[: math.prod(numbers(layout))])


def times(asked: argparse.Namespace, layout: str, llm: LLM) -> dict[str, float]:
    """Empty where ranks share a GPU."""
    return {} if share_a_gpu(asked, layout) else {"token_s": token_s(llm)}


def share_a_gpu(asked: argparse.Namespace, layout: str) -> bool:
    devices = devices_of(asked, layout) or ()
    return len(set(devices)) < len(devices)


def config_of(asked: argparse.Namespace, layout: str) -> EngineConfig:
    tp, pp = numbers(layout)
    return EngineConfig(
        parallel=ParallelConfig.of(tp, pp), device=asked.device, dtype=DTYPE,
        devices=devices_of(asked, layout),
    )  # fmt: skip


def shape_settings(asked: argparse.Namespace, layout: str, dtype: DType) -> EngineConfig:
    config = dataclasses.replace(config_of(asked, layout), dtype=dtype)
    return dataclasses.replace(config, load_format="dummy", max_num_batched_tokens=512)


def shape_prompts(model: PreparedModel) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(model.config.vocab_size, size=size).tolist() for size in SHAPE_PROMPTS]


def answers(
    llm: LLM, prompts: Sequence[list[int]], num_tokens: int, *, tells_prompts: bool = False
) -> Answers:
    params = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True,
        prompt_logprobs=0 if tells_prompts else None,
    )  # fmt: skip
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def agreement(one: Answers, other: Answers) -> dict[str, Any]:
    """Of greedy answers: once two differ, what follows is of different contexts."""
    before = [
        next((at for at, (a, b) in enumerate(zip(ids, others, strict=True)) if a != b), len(ids))
        for ids, others in zip(one, other, strict=True)
    ]
    return {
        "num_answers": len(one),
        "share_of_answers_alike": sum(a == b for a, b in zip(one, other, strict=True)) / len(one),
        "share_of_tokens_before_a_difference": sum(before) / sum(map(len, one)),
    }


def token_s(llm: LLM) -> float:
    """From one token to the next, of 8 requests."""
    seen = Latencies()
    for seed in (1, 2):
        seen = Latencies()
        load = Workload(num_prompts=8, input_len=32, output_len=64, seed=seed)
        measure_throughput(llm, load, seen=seen.note)
    return statistics.median(seen.gaps_s)


def first_token_s(llm: LLM) -> float:
    """Of one prompt."""
    told = Latencies()
    for seed in (3, 4):
        told = Latencies()
        load = Workload(num_prompts=1, input_len=LONG_PROMPT, output_len=1, seed=seed)
        measure_throughput(llm, load, seen=told.note)
    return told.told().ttft_s["p50"]


def shape_cost(asked: argparse.Namespace, layout: str) -> dict[str, float]:
    """Of `deterministic`, for the shape."""
    found = {}
    for name, is_fixed in (("usual", False), ("deterministic", True)):
        more: dict[str, Any] = {"model": str(model_folder(asked.shape)), "load_format": "dummy"}
        with LLM(**(settings(asked, layout, deterministic=is_fixed) | more)) as llm:
            found[f"{name}_token_s"] = token_s(llm)
            found[f"{name}_first_token_s"] = first_token_s(llm)
    return found


def determinism(
    asked: argparse.Namespace, layout: str, prompts: Sequence[list[int]]
) -> dict[str, Any]:
    """Of as few prompts as are told."""
    num_tokens = min(16, asked.tokens)
    with LLM(**settings(asked, layout, deterministic=True)) as llm:
        together = logit_rows(llm, lambda: answers(llm, prompts, num_tokens))
        alone: Rows = {}
        for prompt in prompts:
            alone |= logit_rows(llm, partial(answers, llm, [prompt], num_tokens))
        seconds = times(asked, layout, llm)
    with LLM(**settings(asked, layout, deterministic=True, max_num_batched_tokens=16)) as llm:
        split = logit_rows(llm, lambda: answers(llm, prompts, num_tokens))
    return {
        "num_rows": len(together),
        "num_rows_apart_alone": num_apart(together, alone),
        "num_rows_apart_in_smaller_steps": num_apart(together, split),
        **seconds,
    }


def num_apart(one: Rows, other: Rows) -> int:
    """Tokens whose logits are not the same bit by bit, or that only one of them has."""
    return sum(one.get(place) != other.get(place) for place in one.keys() | other.keys())


def beside_float32(told: Certificate) -> dict[str, Any]:
    return {
        "relative_difference": told.relative_difference, "tolerance": told.tolerance,
        "relative_mean": told.relative_mean, "mean_tolerance": told.mean_tolerance,
        "prefill_agreement": told.prefill_agreement, "decode_agreement": told.decode_agreement,
        "is_same": told.is_same,
    }  # fmt: skip


def measure(
    asked: argparse.Namespace,
    layout: str,
    prompts: list[list[int]],
    longest: list[int],
    reference: Reference,
) -> dict[str, Any]:
    with LLM(**settings(asked, layout)) as llm:
        usual, usual_s = answers(llm, prompts, asked.tokens), times(asked, layout, llm)
        whole = answers(llm, prompts, asked.tokens, tells_prompts=True)
    with LLM(**settings(asked, layout, enforce_eager=True)) as llm:
        eager = answers(llm, prompts, asked.tokens)
    tp, pp = numbers(layout)
    config = config_of(asked, layout)
    told = verify(prepare_model(MODEL), config, prompts, reference=reference)
    return {
        "tp": tp, "pp": pp,
        "beside_float32": beside_float32(told),
        "beside_eager": agreement(usual, eager),
        "beside_all_rows": agreement(usual, whole),
        **usual_s,
        "deterministic": determinism(asked, layout, [*prompts[:7], longest]),
    }  # fmt: skip


def told_cost(seconds: dict[str, float]) -> str:
    """Of the shape, behind the model's."""
    ms = {name: 1e3 * number for name, number in seconds.items()}
    return (
        f"; {ms['deterministic_token_s']:.2f} ({ms['usual_token_s']:.2f}), first token of {LONG_PROMPT:,}"
        f" {ms['deterministic_first_token_s']:.1f} ({ms['usual_first_token_s']:.1f})"
    )


def told_times(one: dict[str, Any]) -> str:
    if "token_s" not in one:
        return "not told"
    return f"{1e3 * one['deterministic']['token_s']:.2f} (usually {1e3 * one['token_s']:.2f})"


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """In Markdown."""
    lines = [
        "| | logits beside float32, in deviations (of a shape with made-up weights) | greedy, of prompts and"
        " decode | answers as eager, as with all rows |"
        " deterministic: tokens whose logits differ by a bit, alone and in smaller steps |"
        " its ms a token (of the shape) |",
        "|---|---|---|---|---|---|",
    ]
    for one in results:
        logits, eager, fixed = one["beside_float32"], one["beside_eager"], one["deterministic"]
        whole, shape = one["beside_all_rows"], one.get("shape_beside_float32")
        of_shape = f"; {shape['relative_difference']:.1e}" if shape else ""
        cost = told_cost(one["shape_cost"]) if "shape_cost" in one else ""
        lines.append(
            f"| tp {one['tp']}, pp {one['pp']} | {logits['relative_difference']:.1e} (at most "
            f"{logits['tolerance']:.0e}{of_shape}) | {logits['prefill_agreement']:.2%}, "
            f"{logits['decode_agreement']:.2%} | {eager['share_of_answers_alike']:.0%} of "
            f"{eager['num_answers']}, {whole['share_of_answers_alike']:.0%} | "
            f"{fixed['num_rows_apart_alone']} and {fixed['num_rows_apart_in_smaller_steps']} of "
            f"{fixed['num_rows']} | "
            f"{told_times(one)}{cost} |"
        )
    return lines


def main() -> None:
    parser = command_line.parser_of(__doc__)
    command_line.add_name(parser, "cpu")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--layouts", nargs="+", type=command_line.layout, default=["1,1", "2,1", "1,2"]
    )
    parser.add_argument("--devices", type=numbers, help="the GPU of each rank")
    parser.add_argument("--shape", type=command_line.shape, help="whose logits are compared too")
    parser.add_argument("--prompts", type=command_line.count, default=64)
    parser.add_argument("--tokens", type=command_line.count, default=64)
    asked = parser.parse_args()
    if asked.prompts > EngineConfig().max_num_seqs:
        parser.error(
            f"--prompts {asked.prompts}: at most {EngineConfig().max_num_seqs} go together"
        )
    if asked.device == "cuda" and asked.devices is None:
        command_line.need_gpus(parser, layouts=asked.layouts)
    model = prepare_model(MODEL)
    for layout in asked.layouts:
        try:
            make_plan(model, config_of(asked, layout))
        except UserError as error:
            parser.error(f"{layout}: {error}")
    tokenizer = Tokenizer(model.folder)
    texts = paragraphs(asked.prompts)
    prompts = [tokenizer.encode(text)[:MOST_PROMPT_TOKENS] for text in texts]
    longest = tokenizer.encode("\n".join(paragraphs(64)))[:LONGEST_TOKENS]
    reference = transformers_reference(model, prompts, 32, "float32")
    shape = shape_reference = None
    if asked.shape:
        shape = prepare_model(model_folder(asked.shape), needs_weights=False)
        in_float32 = shape_settings(asked, "1,1", "float32")
        shape_reference = uncut_reference(shape, in_float32, shape_prompts(shape))
    results = []
    for layout in asked.layouts:
        results.append(measure(asked, layout, prompts, longest, reference))
        if shape is not None and shape_reference is not None:
            config = shape_settings(asked, layout, DTYPE)
            told = verify(shape, config, shape_prompts(shape), reference=shape_reference)
            results[-1]["shape_beside_float32"] = {"shape": asked.shape, **beside_float32(told)}
            if not share_a_gpu(asked, layout):
                results[-1]["shape_cost"] = shape_cost(asked, layout)
        print("\n".join(table(results[-1:])), flush=True)
        record.write(  # what was measured stays, whatever ends the next
            f"fidelity-{asked.name}", ["torch", "triton", "transformers"],
            {"layouts": results, "table": table(results)},
        )  # fmt: skip


if __name__ == "__main__":
    main()
