"""Token ids to text and back, and chat templates, from a Hugging Face folder; no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer as FastTokenizer

from bireme.errors import CheckpointError, RequestError
from bireme.sampling_params import is_unicode
from bireme.text import byte_level_bpe
from bireme.text.tokenizer_config import TokenizerConfig

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


def check_chat_template(template: str) -> None:
    """ValueError says in which line it is no Jinja."""
    try:
        _compile(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from None


class Tokenizer:
    """A fast tokenizer with its special tokens and its chat template, or the one given for it."""

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        self._fast = _load(folder)
        self._fast.no_padding()
        self._fast.no_truncation()
        self._config = TokenizerConfig(folder)
        self._given_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if not is_unicode(text):
            raise RequestError(
                "the text holds half of a surrogate pair; whole characters are needed"
            )
        ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    @property
    def num_tokens(self) -> int:
        return int(self._fast.get_vocab_size())

    @cached_property
    def longest_token(self) -> int:
        """Characters that a token stands for at most (as it is spelled, a byte a character)."""
        return max(map(len, self._fast.get_vocab()))

    def to_json(self) -> str:
        """As in a tokenizer.json."""
        return str(self._fast.to_str())

    def name_of(self, token_id: int) -> str:
        """The text of one token by itself, a special one's name."""
        text: str = self._fast.decode([token_id], skip_special_tokens=False)
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """Of one token by itself; where it is a part of a character, that part's."""
        text = self.name_of(token_id)
        if _UNFINISHED in text:
            spelled = self._fast.id_to_token(token_id) or ""
            if byte := re.fullmatch("<0x([0-9A-F]{2})>", spelled):
                return bytes.fromhex(byte[1])
            if set(spelled) <= byte_level_bpe.BYTES.keys():
                return bytes(byte_level_bpe.BYTES[char] for char in spelled)
        return text.encode()

    def decoder(self) -> IncrementalDecoder:
        """A decoder for one stream of ids."""
        return IncrementalDecoder(self._fast, self.special_ids)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Those that a text leaves out."""
        added = self._fast.get_added_tokens_decoder()
        return frozenset(id_ for id_, token in added.items() if token.special)

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """bos_token and its like, as they are spelled."""
        return {name: token["content"] for name, token in self._config.special_tokens.items()}

    @cached_property
    def chat_template(self) -> str | None:
        """In Jinja; None where the model has none."""
        return self._given_template or self._config.chat_template

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation, as transformers renders it; `variables` are the template's own.

        `continue_final_message` ends it within the last message. RequestError where there is no
        template or it refuses the messages.
        """
        if self._template is None:
            raise RequestError("the model has no chat template; give a plain prompt")
        special = self.special_tokens
        try:
            text = self._template.render(
                {
                    "tools": list(tools) if tools else None,
                    "documents": None,
                    **special,
                    **variables,
                    "messages": list(messages),
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as error:  # a template can raise whatever Python does
            raise RequestError(f"the chat template refuses the messages: {error}") from None
        return _within_last(text, messages) if continue_final_message else text

    @cached_property
    def _template(self) -> jinja2.Template | None:
        return None if self.chat_template is None else _compile(self.chat_template)


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
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _within_last(text: str, messages: Sequence[Message]) -> str:
    """Cuts what the template puts behind the last message."""
    content = str(messages[-1].get("content") or "").strip() if messages else ""
    at = text.rfind(content)
    if not content or at < 0:
        raise RequestError(
            "continue_final_message needs a last message whose content the chat template shows"
        )
    return text[: at + len(content)]


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_MOST_HELD = 16  # tokens; a character has 4 bytes at most


class IncrementalDecoder:
    """Text of a stream of ids, given out once it can no longer change (whole characters)."""

    def __init__(self, fast: FastTokenizer, special_ids: frozenset[int] = frozenset()) -> None:
        self._fast, self._special_ids = fast, special_ids
        self._ids: list[int] = []  # from the last settled text on, which gives the next its context
        self._num_settled = 0

    def add(self, ids: Sequence[int]) -> str:
        """The text that these ids settle; may be empty."""
        return "".join(self._add(id_) for id_ in ids)

    def finish(self) -> str:
        """What was held back: an unfinished character at the very end."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._num_settled])) :]

    def _add(self, id_: int) -> str:
        if (
            id_ in self._special_ids
        ):  # it would be kept, and a long run of them decoded again and again
            return ""
        self._ids.append(id_)
        settled, text = self._decode(self._ids[: self._num_settled]), self._decode(self._ids)
        if len(text) <= len(settled) or text.endswith(_UNFINISHED):
            is_long = len(self._ids) - self._num_settled >= _MOST_HELD
            return self._settle_most(settled, text) if is_long else ""
        return self._settle(len(self._ids), text[len(settled) :])

    def _settle(self, end: int, text: str) -> str:
        """The ids before `end` are settled, by this text."""
        self._ids, self._num_settled = self._ids[self._num_settled :], end - self._num_settled
        return text

    def _settle_most(self, settled: str, text: str) -> str:
        """Of many ids that spell no character, all but the last, which may begin one."""
        for end in range(len(self._ids) - 1, self._num_settled, -1):
            head = self._decode(self._ids[:end])
            if len(settled) < len(head) < len(text) and text.startswith(head):
                return self._settle(end, head[len(settled) :])
        return ""

    def _decode(self, ids: list[int]) -> str:
        text: str = self._fast.decode(ids, skip_special_tokens=True)
        return text
