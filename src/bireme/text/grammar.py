"""What a structured output may go on with: masks of token ids, by llguidance."""

from __future__ import annotations

import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from bireme.errors import EngineError, RequestError
from bireme.sampling_params import StructuredOutputsParams
from bireme.text.tokenizer import Tokenizer

_MAX_CHARACTERS = 1 << 16
_MAX_RULES = 1000
_NUM_TEMPLATES = 16
_COPIES_OF_TEMPLATE = 256
_NOTHING_FITS = "nothing satisfies it: no token may come next"
_TOO_COMPLEX = "it is too complex to follow; use shorter patterns, smaller counts and fewer choices"
_SIGNS_OF_COMPLEXITY = ("too many", "too big", "max is", "too complex")


class GrammarMatcher:
    """How far one text has got in its grammar. `on_failure` is called where it can get no further."""

    def __init__(self, matcher: LLMatcher, on_failure: Callable[[], None] = lambda: None) -> None:
        self._matcher, self._on_failure = matcher, on_failure

    def accept(self, token_ids: list[int]) -> None:
        """Goes on by these ids; EngineError for one that its mask forbids."""
        if self._matcher.consume_tokens(token_ids):
            return
        why = _known_failure(self._matcher.get_error())
        if why is None:
            raise EngineError(f"tokens {token_ids} do not fit the grammar")
        self._on_failure()
        raise EngineError(f"the grammar cannot be followed any further: {why}")

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


class _Templates:
    """The last grammars that could be followed, by their text; each holds some MB at most."""

    def __init__(self, compile_it: Callable[[str], LLMatcher]) -> None:
        self._compile, self._lock = compile_it, threading.Lock()
        self._kept: OrderedDict[str, _Template] = OrderedDict()

    def of(self, grammar: str) -> _Template:
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar]
        template = _Template(lambda: self._compile(grammar))
        with self._lock:
            self._kept[grammar] = template
            if len(self._kept) > _NUM_TEMPLATES:
                self._kept.popitem(last=False)
        return template

    def drop(self, grammar: str) -> None:
        with self._lock:
            self._kept.pop(grammar, None)


class GrammarCompiler:
    """Makes matchers for the vocabulary of one model; remembers the last grammars. For any thread."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        num_ids = max(vocab_size, tokenizer.num_tokens)
        self._tokens = LLTokenizer(
            tokenizer.to_json(), n_vocab=num_ids, eos_token=sorted(eos_token_ids) or None
        )
        self._templates = _Templates(self._compiled)

    def matcher(self, wanted: StructuredOutputsParams) -> GrammarMatcher:
        """RequestError for a schema or a grammar that is none, that nothing satisfies, or that cannot be
        followed in the time of a step."""
        try:
            grammar = _grammar(wanted)
        except Exception as error:  # of a GBNF grammar the library raises bare Exception
            raise RequestError(f"structured outputs: {_one_line(str(error))}") from None
        copy = self._templates.of(grammar).copy()
        return GrammarMatcher(copy, lambda: self._templates.drop(grammar))

    def _compiled(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=_limits())
        if error := matcher.get_error() or _first_failure(matcher):
            raise RequestError(f"structured outputs: {_known_failure(error) or _one_line(error)}")
        return matcher


def _limits() -> LLParserLimits:
    """So that no grammar holds up a step or the memory: with the library's own, `((a{1000}){1000}){1000}`
    takes a second and 160 MB. The first fuel also pays for what a grammar forces (text without a
    choice), and 60 KiB of alternatives need about 60,000 of it."""
    return LLParserLimits(
        initial_lexer_fuel=80_000,
        step_lexer_fuel=60_000,
        step_max_items=20_000,
        max_lexer_states=16_000,
        verbose_errors=False,
    )


def _first_failure(matcher: LLMatcher) -> str:
    """What goes wrong at the first token, or at the second where the grammar forces the first; most of
    what can, does. Empty where nothing does."""
    bits = int.from_bytes(matcher.compute_bitmask(), "little")
    if error := matcher.get_error():
        return str(error)
    if bits.bit_count() != 1:
        return ""
    probe = matcher.deep_copy()
    probe.consume_tokens([bits.bit_length() - 1])
    return str(probe.get_error())


def _known_failure(error: str) -> str | None:
    """What the library's error means, where it is not that a token was wrong."""
    if "NoExtension" in error:
        return _NOTHING_FITS
    is_too_complex = any(sign in error.lower() for sign in _SIGNS_OF_COMPLEXITY)
    return _TOO_COMPLEX if is_too_complex else None


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
    """Written as json.dumps does: with any spaces, a model may write them for ever. `oneOf` is taken as
    `anyOf`."""
    text = json.dumps(schema)
    _check_size(text, text.count("$ref"))
    grammar = LLMatcher.grammar_from_json_schema(
        text,
        overrides={
            "whitespace_flexible": False,
            "item_separator": ", ",
            "key_separator": ": ",
            "coerce_one_of": True,
        },
    )
    return str(grammar)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
