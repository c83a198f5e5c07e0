"""Log-probabilities as the two OpenAI routes spell them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice
from typing import Any

from bireme.outputs import Logprob, Logprobs
from bireme.server.protocol.chat import ChoiceLogprobs, TokenLogprob, TopLogprob
from bireme.server.protocol.completions import CompletionLogprobs
from bireme.text.tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no -inf


def _finite(found: Logprob) -> float:
    return max(found.logprob, _LEAST)


def _text(token_id: int, found: Logprob) -> str:
    return f"token_id:{token_id}" if found.decoded_token is None else found.decoded_token


def chat_logprobs(tokens: Sequence[Logprobs], num_top: int) -> ChoiceLogprobs:
    return ChoiceLogprobs(content=[_chat_token(found, num_top) for found in tokens])


def _chat_token(found: Logprobs, num_top: int) -> TokenLogprob:
    entries = [_top(token_id, one) for token_id, one in found.items()]
    likeliest = sorted(
        zip(entries, found.values(), strict=True), key=lambda pair: pair[1].rank or 0
    )
    return TokenLogprob(
        token=entries[0].token,
        logprob=entries[0].logprob,
        bytes=entries[0].bytes,
        top_logprobs=[entry for entry, _ in islice(likeliest, num_top)],
    )


def _top(token_id: int, found: Logprob) -> TopLogprob:
    text = _text(token_id, found)
    return TopLogprob(token=text, logprob=_finite(found), bytes=list(text.encode(errors="replace")))


def completion_logprobs(
    tokens: Sequence[Logprobs | None],
    ids: Sequence[int],
    tokenizer: Tokenizer | None,
    offset: int,
) -> CompletionLogprobs:
    """Of tokens whose text begins at `offset` (characters); None is a first token, which nothing
    comes before. Special tokens take no room in the text."""
    widths = [len(tokenizer.decode([id_])) if tokenizer else 0 for id_ in ids]
    return CompletionLogprobs(
        text_offset=list(accumulate(widths[:-1], initial=offset)) if ids else [],
        tokens=[tokenizer.name_of(id_) if tokenizer else f"token_id:{id_}" for id_ in ids],
        token_logprobs=[
            None if found is None else _finite(found[token_id])
            for found, token_id in zip(tokens, ids, strict=True)
        ],
        top_logprobs=[None if found is None else _by_text(found) for found in tokens],
    )


def _by_text(found: Logprobs) -> dict[str, float]:
    return {_text(token_id, one): _finite(one) for token_id, one in found.items()}


def prompt_logprobs(found: Sequence[Logprobs | None] | None) -> list[dict[str, Any] | None] | None:
    """As vLLM gives them: by id, with rank and text."""
    if found is None:
        return None
    return [None if one is None else _by_id(one) for one in found]


def _by_id(found: Logprobs) -> dict[str, Any]:
    return {
        str(token_id): {
            "logprob": _finite(one),
            "rank": one.rank,
            "decoded_token": one.decoded_token,
        }
        for token_id, one in found.items()
    }
