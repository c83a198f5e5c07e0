"""Token ids to text and back, and chat templates, from a Hugging Face folder; no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer as FastTokenizer

from bireme.errors import CheckpointError, RequestError
from bireme.text import byte_level_bpe
from bireme.text.tokenizer_config import TokenizerConfig, is_unicode

Message = dict[str, Any]


def has_tokenizer(folder: Path) -> bool:
    """True where `Tokenizer(folder)` has something to read."""
    return (folder / "tokenizer.json").is_file() or byte_level_bpe.is_here(folder)


def check_text(text: str, where: str) -> None:
    """RequestError names `where` (like `prompt 3`) unless the text can be a prompt."""
    if not text:
        raise RequestError(f"{where} is empty; give at least one character")
    if not is_unicode(text):
        raise RequestError(f"{where} holds half of a surrogate pair; whole characters are needed")


class Tokenizer:
    """A fast tokenizer with its special tokens and its chat template."""

    def __init__(self, folder: Path) -> None:
        self._fast = _load(folder)
        self._fast.no_padding()
        self._fast.no_truncation()
        self._config = TokenizerConfig(folder)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if not is_unicode(text):
            raise RequestError(
                "the text holds half of a surrogate pair; whole characters are needed"
            )
        ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def num_tokens(self) -> int:
        return int(self._fast.get_vocab_size())

    def to_json(self) -> str:
        """As in a tokenizer.json."""
        return str(self._fast.to_str())

    def name_of(self, token_id: int) -> str:
        """The text of one token by itself, a special one's name."""
        text: str = self._fast.decode([token_id], skip_special_tokens=False)
        return text

    def decoder(self) -> IncrementalDecoder:
        """A decoder for one stream of ids."""
        return IncrementalDecoder(self._fast)

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation, as transformers renders it.

        RequestError where there is no template or it refuses the messages.
        """
        template = self._config.chat_template
        if template is None:
            raise RequestError("the model has no chat template; give a plain prompt")
        special = {name: token["content"] for name, token in self._config.special_tokens.items()}
        try:
            return _compile(template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **special
            )
        except Exception as error:  # a template can raise whatever Python does
            raise RequestError(f"the chat template refuses the messages: {error}") from None


def _load(folder: Path) -> FastTokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        if byte_level_bpe.is_here(folder):
            return byte_level_bpe.load(folder)
        raise CheckpointError(f"{folder} has no tokenizer.json; give token ids instead of text")
    try:
        return FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a broken file
        raise CheckpointError(f"{path} is no tokenizer: {error}") from None


def _compile(template: str) -> jinja2.Template:
    """In a sandbox, with the environment that Hugging Face templates expect."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class IncrementalDecoder:
    """Text of a stream of ids, given out once it can no longer change (whole characters)."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        self._ids: list[int] = []  # from the last settled text on, which gives the next its context
        self._num_settled = 0

    def add(self, ids: Sequence[int]) -> str:
        """The text that these ids settle; may be empty."""
        return "".join(self._add(id_) for id_ in ids)

    def finish(self) -> str:
        """What was held back: an unfinished character at the very end."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._num_settled])) :]

    def _add(self, id_: int) -> str:
        self._ids.append(id_)
        settled, text = self._decode(self._ids[: self._num_settled]), self._decode(self._ids)
        if len(text) <= len(settled) or text.endswith(_UNFINISHED):
            return ""
        self._ids = self._ids[self._num_settled :]
        self._num_settled = len(self._ids)
        return text[len(settled) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._fast.decode(ids, skip_special_tokens=True)
        return text
