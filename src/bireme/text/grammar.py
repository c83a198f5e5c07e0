"""What a structured output may go on with: masks of token ids, by llguidance."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import lru_cache

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from bireme.errors import EngineError, RequestError
from bireme.sampling_params import StructuredOutputsParams
from bireme.text.tokenizer import Tokenizer

_MAX_CHARACTERS = 1 << 16
_MAX_RULES = 1000
_NUM_TEMPLATES = 32
_COPIES_OF_TEMPLATE = 256


class GrammarMatcher:
    """How far one text has got in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def accept(self, token_ids: list[int]) -> None:
        """Goes on by these ids; EngineError for one that its mask forbids."""
        if not self._matcher.consume_tokens(token_ids):
            raise EngineError(
                f"tokens {token_ids} do not fit the grammar: {_one_line(self._matcher.get_error())}"
            )

    def mask(self) -> bytes:
        """Bit i % 8 of byte i // 8 allows id i."""
        return bytes(self._matcher.compute_bitmask())

    @property
    def is_stopped(self) -> bool:
        """True once the text is complete and nothing but its end may follow."""
        return bool(self._matcher.is_stopped())


class _Template:
    """A compiled grammar to be copied. Copies share what their lexers find out, which is bounded: it is
    compiled again after so many of them."""

    def __init__(self, compile_it: Callable[[], LLMatcher]) -> None:
        self._compile, self._num_copies = compile_it, itertools.count(1)
        self._matcher = compile_it()

    def copy(self) -> LLMatcher:
        if next(self._num_copies) % _COPIES_OF_TEMPLATE == 0:
            self._matcher = self._compile()
        return self._matcher.deep_copy()


class GrammarCompiler:
    """Makes matchers for the vocabulary of one model; remembers the last grammars. For any thread."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        num_ids = max(vocab_size, tokenizer.num_tokens)
        self._tokens = LLTokenizer(
            tokenizer.to_json(), n_vocab=num_ids, eos_token=sorted(eos_token_ids) or None
        )
        self._template = lru_cache(_NUM_TEMPLATES)(
            lambda grammar: _Template(lambda: self._compiled(grammar))
        )

    def matcher(self, wanted: StructuredOutputsParams) -> GrammarMatcher:
        """RequestError for a schema or a grammar that is none."""
        try:
            grammar = _grammar(wanted)
        except Exception as error:  # of a GBNF grammar the library raises bare Exception
            raise RequestError(f"structured outputs: {_one_line(str(error))}") from None
        return GrammarMatcher(self._template(grammar).copy())

    def _compiled(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"structured outputs: {_one_line(matcher.get_error())}")
        return matcher


def _grammar(wanted: StructuredOutputsParams) -> str:
    if wanted.json_object:
        return _of_schema({"type": "object"})
    if wanted.json is not None:
        schema = json.loads(wanted.json) if isinstance(wanted.json, str) else wanted.json
        return _of_schema(schema)
    if wanted.regex is not None:
        _check_size(wanted.regex, 0)
        return str(LLMatcher.grammar_from_regex(wanted.regex))
    if wanted.choice is not None:
        quoted = (json.dumps(text, ensure_ascii=False) for text in wanted.choice)
        texts = " | ".join(quoted).replace("\x7f", "\\u007f")
        _check_size(texts, 0)
        return str(LLMatcher.grammar_from_lark(f"start: {texts}"))
    assert wanted.grammar is not None
    _check_size(wanted.grammar, wanted.grammar.count(":") - wanted.grammar.count("::"))
    return str(LLMatcher.grammar_from_lark(any_to_lark(wanted.grammar)))


def _check_size(text: str, num_rules: int) -> None:
    """ValueError for more than the library is known to bear: chains of 2,500 rules overflow its stack,
    which ends the process, and it compiles 64 KiB in seconds."""
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters are too many; use at most {_MAX_CHARACTERS}")
    if num_rules > _MAX_RULES:
        raise ValueError(f"{num_rules} rules are too many; use at most {_MAX_RULES}")


def _of_schema(schema: object) -> str:
    """Written as json.dumps does: with any spaces, a model may write them for ever."""
    text = json.dumps(schema)
    _check_size(text, text.count("$ref"))
    grammar = LLMatcher.grammar_from_json_schema(
        text,
        overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    )
    return str(grammar)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
