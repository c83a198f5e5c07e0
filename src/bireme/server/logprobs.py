"""Log-probabilities as the two OpenAI routes spell them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any

from bireme.outputs import Delta, Logprob, Logprobs
from bireme.server.protocol.chat import ChoiceLogprobs, TokenLogprob, TopLogprob
from bireme.server.protocol.completions import CompletionLogprobs
from bireme.text.tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no -inf


def _finite(found: Logprob) -> float:
    return max(found.logprob, _LEAST)


def _text(token_id: int, found: Logprob) -> str:
    return f"token_id:{token_id}" if found.decoded_token is None else found.decoded_token


def chat_logprobs(tokens: Sequence[Logprobs], num_top: int, tokenizer: Tokenizer) -> ChoiceLogprobs:
    return ChoiceLogprobs(content=[_chat_token(found, num_top, tokenizer) for found in tokens])


def _chat_token(found: Logprobs, num_top: int, tokenizer: Tokenizer) -> TokenLogprob:
    entries = [_top(token_id, one, tokenizer) for token_id, one in found.items()]
    likeliest = sorted(
        zip(entries, found.values(), strict=True), key=lambda pair: pair[1].rank or 0
    )
    return TokenLogprob(
        token=entries[0].token,
        logprob=entries[0].logprob,
        bytes=entries[0].bytes,
        top_logprobs=[entry for entry, _ in islice(likeliest, num_top)],
    )


def _top(token_id: int, found: Logprob, tokenizer: Tokenizer) -> TopLogprob:
    return TopLogprob(
        token=_text(token_id, found),
        logprob=_finite(found),
        bytes=list(tokenizer.bytes_of(token_id)),
    )


class TokenTexts:
    """Cuts an answer behind each of its tokens, however both come: a text comes behind its tokens, and
    is shorter where a stop string ends it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.decoder()
        self._text = ""
        self._tokens: deque[tuple[int, Logprobs]] = deque()  # with the characters of each

    def add(self, delta: Delta, *, is_end: bool) -> list[tuple[str, list[Logprobs]]]:
        self._text += delta.text
        for id_, found in zip(delta.token_ids, delta.logprobs, strict=True):
            self._tokens.append((len(self._decoder.add([id_])), found))
        pieces = []
        while self._tokens and self._tokens[0][0] <= len(self._text):
            length, found = self._tokens.popleft()
            pieces.append((self._text[:length], [found]))
            self._text = self._text[length:]
        if is_end:
            pieces.append((self._text, [found for _, found in self._tokens]))
        return pieces


Place = tuple[int, str]  # where a token's text begins, and what it is called
# A token, its log-probabilities, its place. None: nothing comes before a first token.
TokenTold = tuple[int, Logprobs | None, Place]


class TokenPlaces:
    """Where each token of one choice begins in its text, and the text that it brings there, as they
    come: of a character of several tokens all begin with it, and the last one brings it.

    A token that brings none is called as it is by itself.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer, self._offset = tokenizer, 0
        self._decoder = tokenizer.decoder() if tokenizer else None

    def of_prompt(self, ids: Sequence[int], shown: str) -> list[Place]:
        """What comes behind it begins at the end of what is shown of it."""
        places = [self._place(id_, shown) for id_ in ids]
        self._offset = len(shown)
        self._decoder = self._tokenizer.decoder() if self._tokenizer else None
        return places

    def of_answer(self, ids: Sequence[int]) -> list[Place]:
        return [self._place(id_) for id_ in ids]

    def _place(self, id_: int, shown: str = "") -> Place:
        if self._tokenizer is None or self._decoder is None:
            return 0, f"token_id:{id_}"
        offset, text = self._offset, self._decoder.add([id_])
        name = text or self._tokenizer.name_of(id_)
        is_typed = id_ in self._tokenizer.special_ids and shown.startswith(name, offset)
        self._offset += len(name if is_typed else text)
        return offset, name


def completion_logprobs(told: Sequence[TokenTold]) -> CompletionLogprobs:
    return CompletionLogprobs(
        text_offset=[offset for _, _, (offset, _) in told],
        tokens=[name for _, _, (_, name) in told],
        token_logprobs=[found if found is None else _finite(found[id_]) for id_, found, _ in told],
        top_logprobs=[
            found if found is None else _by_text(found, name) for _, found, (_, name) in told
        ],
    )


def _by_text(found: Logprobs, name: str) -> dict[str, float]:
    """The chosen token by its name; of others of one text the likeliest."""
    chosen, *others = found.items()
    told = {name: _finite(chosen[1])}
    for token_id, one in others:
        told.setdefault(_text(token_id, one), _finite(one))
    return told


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
