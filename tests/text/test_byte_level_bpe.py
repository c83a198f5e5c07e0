"""vocab.json and merges.txt without a tokenizer.json, as GPT-2 and OPT are on the Hub."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from bireme.errors import CheckpointError, UserError
from bireme.text.tokenizer import Tokenizer, has_tokenizer

CORPUS = ["The with statement opens a file.", "def f(x):\n\treturn x + 1", "naïve café 日本"] * 40
OPT_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
TEXTS = [
    "The with statement", " opens a file", "def f(x):\n\treturn x", "naïve 日本 🚣", "",
    "a</s>b", "<s> x <pad>y", "one<|endoftext|> two", "  three   spaces ", "it's <sep> we'll",
]  # fmt: skip


def _added(content: str, **more: bool) -> dict[str, Any]:
    """As OPT's tokenizer_config.json spells a token."""
    matching = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **matching, **more}


OPT_CONFIG = {
    "errors": "replace",
    "unk_token": _added("</s>"),
    "bos_token": _added("</s>"),
    "eos_token": _added("</s>"),
    "pad_token": _added("<pad>"),
    "add_prefix_space": False,
    "add_bos_token": True,
    "special_tokens_map_file": None,
    "tokenizer_class": "GPT2Tokenizer",
}
OPT_MAP = {
    name: {key: value for key, value in _added(text).items() if key != "__type"}
    for name, text in (("bos_token", "</s>"), ("eos_token", "</s>"), ("unk_token", "</s>"))
} | {"pad_token": "<pad>"}

# model type, special tokens of the vocabulary, and the files beside it
FOLDERS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "gpt2": ("gpt2", ["<|endoftext|>"], {}),
    "gpt2 that lacks its token": ("gpt2", [], {}),
    "opt": (
        "opt",
        OPT_TOKENS,
        {"tokenizer_config.json": OPT_CONFIG, "special_tokens_map.json": OPT_MAP},
    ),
    "opt without a map": ("opt", OPT_TOKENS, {"tokenizer_config.json": OPT_CONFIG}),
    "the map has the last word": (
        "opt",
        OPT_TOKENS,
        {
            "tokenizer_config.json": {"bos_token": "</s>", "add_bos_token": True},
            "special_tokens_map.json": {"bos_token": "<s>", "sep_token": "<sep>"},
        },
    ),
    "prefix space and both ends": (
        "gpt2",
        ["<|endoftext|>"],
        {
            "tokenizer_config.json": {
                "add_prefix_space": True,
                "add_bos_token": True,
                "add_eos_token": True,
            }
        },
    ),
    "added tokens of old": (
        "gpt2",
        ["<|endoftext|>"],
        {
            "added_tokens.json": {"<sep>": 301, "<pad>": 300},
            "tokenizer_config.json": {"pad_token": "<pad>"},
        },
    ),
    "added tokens of today": (
        "gpt2",
        ["<|endoftext|>"],
        {
            "tokenizer_config.json": {
                "added_tokens_decoder": {
                    "301": {"content": "<sep>", "lstrip": True, "special": True},
                    "300": {"content": "<pad>", "rstrip": True, "special": False},
                },
                "tokenizer_class": "GPT2Tokenizer",
            },
            "special_tokens_map.json": {"bos_token": "<s>"},
        },
    ),
}


def _write(folder: Path, name: str) -> Path:
    model_type, special, files = FOLDERS[name]
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.model.save(str(folder))
    for file, fields in {"config.json": {"model_type": model_type}, **files}.items():
        (folder / file).write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("bpe"), request.param)


def test_ids_and_texts_are_those_of_transformers(folder: Path) -> None:
    assert has_tokenizer(folder)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        plain = ours.encode(text, add_special_tokens=False)
        assert plain == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_opt_begins_with_its_end_token(tmp_path: Path) -> None:
    ids = Tokenizer(_write(tmp_path, "opt")).encode("The")
    assert ids[0] == OPT_TOKENS.index("</s>")
    assert len(ids) > 1


@settings(deadline=None, max_examples=80)
@given(text=st.text(max_size=30))
def test_any_text_has_the_ids_of_transformers(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any text"
    if not folder.exists():
        _write(folder, "opt")
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == text


def test_another_kind_of_tokenizer_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """Qwen2 has these two files, too, and splits texts otherwise."""
    _write(tmp_path, "gpt2")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert not has_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; give token ids"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert not has_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_broken_vocabulary_is_named(tmp_path: Path, file: str) -> None:
    _write(tmp_path, "gpt2")
    (tmp_path / file).write_text("junk: [")
    with pytest.raises(
        CheckpointError, match=r"a vocab\.json or a merges\.txt that cannot be read"
    ):
        Tokenizer(tmp_path)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
FIELDS = (
    "add_prefix_space", "add_bos_token", "add_eos_token", "bos_token", "eos_token", "pad_token",
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "chat_template",
    "tokenizer_class",
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JUNK, min_size=1))
def test_junk_in_a_tokenizer_config_is_no_traceback(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "junk"
    if not folder.exists():
        _write(folder, "gpt2")
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    with contextlib.suppress(UserError):
        tokenizer = Tokenizer(folder)
        tokenizer.encode("The with statement")
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
