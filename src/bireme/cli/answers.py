"""How answers are printed: as text for people, or a JSON line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bireme.outputs import CompletionOutput, Delta, Logprobs, RequestOutput


def print_text(
    deltas: Iterator[Delta], num_answers: int, echoed: Sequence[str], *, has_text: bool, quiet: bool
) -> None:
    """The only answer streams; several are printed whole, when their prompt has ended. Without a
    tokenizer: ids. `echoed` comes before the answers to each prompt."""
    if num_answers == 1:
        print(echoed[0], end="", flush=True)
    for delta in deltas:
        if num_answers == 1:
            print(_text(delta, has_text), end="", flush=True)
        if delta.output is None:
            continue
        if num_answers == 1:
            print(flush=True)
        else:
            _print_whole(delta.index, delta.output, echoed[delta.index], has_text)
        if not quiet:
            _print_metrics(delta.output)


def _text(piece: Delta | CompletionOutput, has_text: bool) -> str:
    return piece.text if has_text else "".join(f"{id_} " for id_ in piece.token_ids)


def _print_whole(index: int, output: RequestOutput, echoed: str, has_text: bool) -> None:
    for answer in output.outputs:
        which = f", answer {answer.index}" if len(output.outputs) > 1 else ""
        print(f"--- prompt {index}{which}\n{echoed}{_text(answer, has_text)}", flush=True)


def _print_metrics(output: RequestOutput) -> None:
    metrics = output.metrics
    assert metrics is not None
    reasons = "/".join(dict.fromkeys(str(answer.finish_reason) for answer in output.outputs))
    print(
        f"  {metrics.num_tokens} tokens, {reasons}; first after "
        f"{metrics.ttft_s * 1000:.0f} ms, {metrics.tokens_per_s:.1f} tokens/s",
        file=sys.stderr,
    )


def print_json(deltas: Iterator[Delta], echoed: Sequence[str]) -> None:
    """`echoed` as `prompt` where it is not empty."""
    for delta in deltas:
        if delta.output is None:
            continue
        for answer in delta.output.outputs:
            line = _as_json(delta.index, delta.output, answer, echoed[delta.index])
            print(json.dumps(line), flush=True)


def _as_json(
    index: int, output: RequestOutput, answer: CompletionOutput, echoed: str
) -> dict[str, Any]:
    metrics = output.metrics
    assert metrics is not None
    line: dict[str, Any] = {
        "index": index,
        "choice": answer.index,
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": answer.token_ids,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "ttft_s": round(metrics.ttft_s, 6),
        "tokens_per_s": round(metrics.tokens_per_s, 3),
    }
    if echoed:
        line["prompt"] = echoed
    if answer.logprobs is not None:
        line["logprobs"] = [_likely(found) for found in answer.logprobs]
    if output.prompt_logprobs is not None:
        line["prompt_logprobs"] = [found and _likely(found) for found in output.prompt_logprobs]
    return line


def _likely(found: Logprobs) -> dict[str, Any]:
    """The token that is there; beside it the likeliest ones and itself, the likeliest first."""
    entries = [
        {"token": of.decoded_token, "id": id_, "logprob": round(of.logprob, 6), "rank": of.rank}
        for id_, of in found.items()
    ]
    return {**entries[0], "top_logprobs": sorted(entries, key=lambda entry: entry["rank"] or 0)}
