"""Structured output: whoever keeps to the masks writes what was asked for."""

from __future__ import annotations

import json
import re
from functools import cache
from random import Random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bireme.checkpoint.prepared import PreparedModel, prepare_model
from bireme.errors import EngineError, RequestError
from bireme.sampling_params import StructuredOutputsParams
from bireme.text.grammar import GrammarCompiler, GrammarMatcher
from bireme.text.tokenizer import Tokenizer

LONGEST = 400  # tokens; arrays and strings of the schemas are short


@cache
def demo() -> tuple[PreparedModel, Tokenizer, GrammarCompiler]:
    model = prepare_model("demo", needs_weights=False)
    tokenizer = Tokenizer(model.folder)
    return (
        model,
        tokenizer,
        GrammarCompiler(tokenizer, model.config.vocab_size, model.eos_token_ids),
    )


def allowed(matcher: GrammarMatcher) -> list[int]:
    mask = matcher.mask()
    vocab = demo()[0].config.vocab_size
    return [id_ for id_ in range(vocab) if mask[id_ // 8] >> (id_ % 8) & 1]


def walk(wanted: StructuredOutputsParams, random: Random) -> str:
    """A text of random allowed tokens; the shortest where it grows long."""
    _, tokenizer, compiler = demo()
    matcher, ids = compiler.matcher(wanted), list[int]()
    while not matcher.is_stopped and len(ids) < LONGEST:
        ids.append(random.choice(allowed(matcher)))
        matcher.accept(ids[-1:])
    assert matcher.is_stopped, tokenizer.decode(ids)
    return tokenizer.decode(ids)


LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-50, 50),
        st.integers(0, 99),
    ),
    st.integers(0, 6).map(lambda size: {"type": "string", "maxLength": size}),
    st.lists(st.text("abc \"'{}é", max_size=5), min_size=1, max_size=3, unique=True).map(
        lambda texts: {"enum": texts}
    ),
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = st.dictionaries(st.text("xyz-", min_size=1, max_size=4), inner, max_size=3).map(
        lambda properties: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[:2],
            "additionalProperties": False,
        }
    )
    arrays = st.builds(
        lambda items, most: {"type": "array", "items": items, "maxItems": most},
        inner,
        st.integers(0, 2),
    )
    return st.one_of(
        objects, arrays, st.lists(inner, min_size=1, max_size=2).map(lambda s: {"anyOf": s})
    )


@settings(max_examples=60, deadline=None)
@given(st.recursive(LEAVES, _nested, max_leaves=5), st.integers(0, 2**32).map(Random))
def test_a_text_within_the_masks_parses_against_its_schema(schema: Any, random: Random) -> None:
    text = walk(StructuredOutputsParams(json=schema), random)
    jsonschema.validate(json.loads(text), schema)


def test_a_schema_may_be_a_text() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False  # type: ignore[assignment]
    text = walk(StructuredOutputsParams(json=json.dumps(schema)), Random(0))
    assert json.loads(text).keys() == {"a"}


def test_regex_choice_and_both_kinds_of_grammar() -> None:
    random = Random(1)
    for _ in range(10):
        pattern = r"[0-9]{2}-[a-c]+x"
        while (
            len(text := walk(StructuredOutputsParams(regex=r"[0-9]{2}-[a-c]{1,9}x"), random)) > 14
        ):
            pass
        assert re.fullmatch(pattern, text)
        assert walk(StructuredOutputsParams(choice=["yes", 'n"o', "né", "a\x7fb"]), random) in (
            "yes",
            'n"o',
            "né",
            "a\x7fb",
        )
        assert walk(StructuredOutputsParams(grammar='start: "a" | "b" "c"'), random) in ("a", "bc")
        assert walk(StructuredOutputsParams(grammar='root ::= "a" | "b" "c"'), random) in (
            "a",
            "bc",
        )


def test_an_object_without_a_schema_is_any_object_and_nothing_else() -> None:
    _, tokenizer, compiler = demo()

    def fits(text: str) -> bool:
        matcher = compiler.matcher(StructuredOutputsParams(json_object=True))
        for id_ in tokenizer.encode(text, add_special_tokens=False):
            if id_ not in allowed(matcher):
                return False
            matcher.accept([id_])
        return matcher.is_stopped

    assert fits('{"a": [1, {"b": null}], "c": "}"}')
    assert not fits('[{"a": 1}]')
    assert not fits('{"a": 1')


@pytest.mark.parametrize(
    "wanted",
    [
        StructuredOutputsParams(json={"$ref": "#"}),
        StructuredOutputsParams(grammar="start: start"),
        StructuredOutputsParams(json={"allOf": [{"enum": [1]}, {"enum": [2]}]}),
    ],
)
def test_what_nothing_satisfies_is_refused_at_once(wanted: StructuredOutputsParams) -> None:
    with pytest.raises(RequestError, match=r"(?i)nothing satisfies it|unsatisfiable") as caught:
        demo()[2].matcher(wanted)
    assert "<" not in str(caught.value)


def test_one_of_is_any_of() -> None:
    kinds = [{"type": "integer", "minimum": 0, "maximum": 9}, {"enum": [7, "seven"]}]
    schema = {"oneOf": kinds}
    texts = {walk(StructuredOutputsParams(json=schema), Random(seed)) for seed in range(20)}
    assert texts <= {*map(str, range(10)), '"seven"'}
    assert '"seven"' in texts


def num_templates() -> int:
    return len(demo()[2]._templates._kept)


@pytest.mark.parametrize(
    "wanted",
    [
        StructuredOutputsParams(regex="((a{1000}){1000}){1000}"),
        StructuredOutputsParams(regex="(a?){3000}a{3000}"),
        StructuredOutputsParams(grammar="start: A\nA: /x((a{1000}){1000}){1000}/"),
        StructuredOutputsParams(grammar='start: "a"{1000000}'),
        StructuredOutputsParams(json={"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}),
    ],
)
def test_a_grammar_that_costs_too_much_is_refused_and_not_kept(
    wanted: StructuredOutputsParams,
) -> None:
    before = num_templates()
    with pytest.raises(RequestError, match="too complex to follow"):
        demo()[2].matcher(wanted)
    assert num_templates() == before


def test_a_grammar_that_grows_too_complex_ends_its_text_and_is_forgotten() -> None:
    wanted = StructuredOutputsParams(regex="[^a]*(a{300}){300}b")
    demo()[2].matcher(wanted)
    before = num_templates()
    with pytest.raises(EngineError, match="any further: it is too complex") as caught:
        walk(wanted, Random(0))
    assert "<" not in str(caught.value)
    assert num_templates() == before - 1


def _chain(num_rules: int) -> str:
    rules = [f'e{at}: "a" e{at + 1} | "b"' for at in range(num_rules)]
    return "\n".join(["start: e0", *rules, f'e{num_rules}: "c"'])


def _chained_schema(num_rules: int) -> dict[str, Any]:
    chained = {
        f"d{at}": {"type": "array", "items": {"$ref": f"#/$defs/d{at + 1}"}}
        for at in range(num_rules)
    }
    return {"$defs": {**chained, f"d{num_rules}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def test_long_chains_of_rules_that_the_library_bears_are_served() -> None:
    for wanted in ({"grammar": _chain(900)}, {"json": _chained_schema(500)}):
        assert not demo()[2].matcher(StructuredOutputsParams(**wanted)).is_stopped  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wanted",
    [
        StructuredOutputsParams(regex="(ab"),
        StructuredOutputsParams(grammar="start: foo"),
        StructuredOutputsParams(grammar="root ::= ("),
        StructuredOutputsParams(grammar='a ::= "x"'),
        StructuredOutputsParams(json="{bad"),
        StructuredOutputsParams(json={"type": "foo"}),
        StructuredOutputsParams(json={"$ref": "#/nowhere"}),
        StructuredOutputsParams(grammar=_chain(3000)),
        StructuredOutputsParams(json=_chained_schema(3000)),
        StructuredOutputsParams(regex="a" * 70_000),
        StructuredOutputsParams(choice=["a" * 70_000]),
    ],
)
def test_what_is_no_grammar_is_refused_in_one_line(wanted: StructuredOutputsParams) -> None:
    with pytest.raises(RequestError) as caught:
        demo()[2].matcher(wanted)
    assert "\n" not in str(caught.value)


def test_answers_in_one_grammar_do_not_disturb_one_another() -> None:
    """Their matchers are copies; more of them than are made of one compiled grammar."""
    _, tokenizer, compiler = demo()
    wanted, first = StructuredOutputsParams(regex="(ab|cd)e"), tokenizer.encode("ab")[-1:]
    began = compiler.matcher(wanted)
    fresh = allowed(began)
    began.accept(first)
    going_on = allowed(began)
    assert going_on != fresh
    for _ in range(300):
        assert allowed(compiler.matcher(wanted)) == fresh
    assert allowed(began) == going_on


def test_a_token_outside_the_grammar_is_an_error() -> None:
    _, tokenizer, compiler = demo()
    matcher = compiler.matcher(StructuredOutputsParams(choice=["yes"]))
    with pytest.raises(EngineError, match="do not fit the grammar"):
        matcher.accept(tokenizer.encode("no", add_special_tokens=False))


def test_exactly_one_structure_is_asked_for() -> None:
    with pytest.raises(RequestError, match="regex, choice"):
        StructuredOutputsParams(regex="a", choice=["a"])
    with pytest.raises(RequestError, match="none"):
        StructuredOutputsParams()
    with pytest.raises(RequestError, match="choice"):
        StructuredOutputsParams(choice=[])
