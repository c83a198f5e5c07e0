"""Text in and out: as transformers does it, and streamed text equals whole text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models
from transformers import AutoTokenizer

from bireme.checkpoint.hub import resolve_model
from bireme.errors import CheckpointError, ConfigError, RequestError
from bireme.text.tokenizer import IncrementalDecoder, Tokenizer

DEMO = resolve_model("demo")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does json.dumps do?"},
    {"role": "assistant", "content": "It writes JSON."},
    {"role": "user", "content": "And loads?"},
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer(DEMO)


@pytest.fixture(scope="module")
def theirs() -> object:
    return AutoTokenizer.from_pretrained(DEMO)


def test_bytes_of_tokens_are_those_of_their_text(ours: Tokenizer) -> None:
    text = "The naïve 日本 🚣\n\t\x00\x7f\xa0\xad"
    ids = ours.encode(text, add_special_tokens=False)
    assert b"".join(map(ours.bytes_of, ids)) == text.encode()
    assert all(ours.bytes_of(id_) for id_ in range(ours.num_tokens))
    special = min(ours.special_ids)
    assert ours.bytes_of(special) == ours.name_of(special).encode()


@pytest.mark.parametrize(
    "text", ["The with statement", "def f(x):\n\treturn x", "naïve 日本 🚣", ""]
)
def test_ids_are_those_of_transformers(ours: Tokenizer, theirs: object, text: str) -> None:
    assert ours.encode(text) == theirs(text)["input_ids"]  # type: ignore[operator]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_prompts_are_those_of_transformers(
    ours: Tokenizer, theirs: object, add_generation_prompt: bool
) -> None:
    expected = theirs.apply_chat_template(  # type: ignore[attr-defined]
        CHAT, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert ours.apply_chat_template(CHAT, add_generation_prompt=add_generation_prompt) == expected


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40), st.data())
def test_streamed_text_equals_whole_text(text: str, data: st.DataObject) -> None:
    tokenizer = Tokenizer(DEMO)
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoder, got, at = tokenizer.decoder(), "", 0
    while at < len(ids):
        step = data.draw(st.integers(1, 4))
        piece = decoder.add(ids[at : at + step])
        assert "\ufffd" not in piece or "\ufffd" in text
        got, at = got + piece, at + step
    assert got + decoder.finish() == tokenizer.decode(ids)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2047), max_size=30))
def test_any_ids_stream_to_their_whole_text(ids: list[int]) -> None:
    tokenizer = Tokenizer(DEMO)
    decoder = tokenizer.decoder()
    assert "".join(decoder.add([id_]) for id_ in ids) + decoder.finish() == tokenizer.decode(ids)


def single_bytes(tokenizer: Tokenizer) -> list[int]:
    """The tokens that are parts of characters."""
    return [id_ for id_ in range(tokenizer.num_tokens) if tokenizer.decode([id_]) == "\ufffd"]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_bytes_stream_to_their_whole_text(data: st.DataObject) -> None:
    tokenizer = Tokenizer(DEMO)
    parts = single_bytes(tokenizer)
    ids = data.draw(st.lists(st.sampled_from(parts), min_size=20, max_size=60))
    decoder = tokenizer.decoder()
    assert "".join(decoder.add([id_]) for id_ in ids) + decoder.finish() == tokenizer.decode(ids)


class Counting:
    """A tokenizer that counts the tokens that it is given."""

    def __init__(self) -> None:
        self._fast, self.num = FastTokenizer.from_file(str(DEMO / "tokenizer.json")), 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.num += len(ids)
        text: str = self._fast.decode(ids, skip_special_tokens=skip_special_tokens)
        return text


@pytest.mark.parametrize("kind", ["part of a character", "special", "word"])
def test_a_run_of_one_token_takes_time_in_proportion(ours: Tokenizer, kind: str) -> None:
    special = ours.special_ids
    found = {"part of a character": single_bytes(ours)[-1], "special": min(special), "word": 300}
    ids, fast = [found[kind]] * 3000, Counting()
    decoder = IncrementalDecoder(fast, special)  # type: ignore[arg-type]
    text = decoder.add(ids) + decoder.finish()
    assert text == ours.decode(ids)
    assert fast.num < 150 * len(ids)


def test_a_template_that_refuses_says_so(ours: Tokenizer) -> None:
    with pytest.raises(RequestError, match="the roles are system, user and assistant"):
        ours.apply_chat_template([{"role": "robot", "content": "hi"}])


def test_half_a_character_is_refused(ours: Tokenizer) -> None:
    with pytest.raises(RequestError, match="half of a surrogate pair"):
        ours.encode("a \ud83d b")


@pytest.mark.parametrize(
    ("file", "fields", "says"),
    [
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template 3; a text or a list"),
        ("tokenizer_config.json", {"bos_token": ["a"]}, r"bos_token \['a'\]; the text of a token"),
        ("tokenizer_config.json", {"bos_token": "\ud83d"}, "bos_token .*; the text of a token"),
        ("special_tokens_map.json", {"bos_token": 1}, "special_tokens_map.json gives bos_token 1"),
    ],
)
def test_a_field_of_no_use_is_named_where_it_is_needed(
    file: str, fields: dict[str, object], says: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (tmp_path / file).write_text(json.dumps({"chat_template": "{{ messages }}", **fields}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("The with statement")
    with pytest.raises(ConfigError, match=says):
        tokenizer.apply_chat_template(CHAT)


def test_whatever_a_template_raises_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    with pytest.raises(RequestError, match="the chat template refuses the messages"):
        Tokenizer(tmp_path).apply_chat_template(CHAT)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; give token ids"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no tokenizer"):
        Tokenizer(tmp_path)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 259), max_size=30))
def test_invalid_bytes_of_a_byte_fallback_tokenizer_stream(ids: list[int]) -> None:
    """Llama 2's kind: 256 byte tokens, and words that start with a mark for the space."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    words = {word: 256 + index for index, word in enumerate(["<unk>", "▁The", "▁end", "s"])}
    fast = FastTokenizer(models.BPE(vocab | words, [], byte_fallback=True, unk_token="<unk>"))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    decoder = IncrementalDecoder(fast)
    text = "".join(decoder.add([id_]) for id_ in ids) + decoder.finish()
    if all(id_ < 128 or id_ >= 256 for id_ in ids):
        assert text == fast.decode(ids)
