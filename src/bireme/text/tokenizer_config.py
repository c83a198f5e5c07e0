"""What a folder says of its tokenizer beside the vocabulary: special tokens, switches, templates."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from bireme.errors import CheckpointError
from bireme.hf_config import read_json
from bireme.hf_config.readers import Unfit, flag, list_of, optional, read, text, whole
from bireme.sampling_params import is_unicode

Token = dict[str, Any]  # the arguments of `tokenizers.AddedToken`

_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_MATCHING = ("lstrip", "rstrip", "single_word", "normalized", "special")


def _token(value: Any) -> Token:
    """A token spelled as a string or as an object."""
    spelled = value if isinstance(value, dict) else {"content": value}
    matching = {key: spelled[key] for key in _MATCHING if key in spelled}
    content = spelled.get("content")
    if not isinstance(content, str) or not content or not is_unicode(content):
        raise Unfit("the text of a token")
    if any(type(given) is not bool for given in matching.values()):
        raise Unfit(f"a token whose {', '.join(_MATCHING)} are true or false")
    return {"content": content, **matching}


def _tokens_by_id(value: Any) -> list[Token]:
    if not isinstance(value, dict) or not all(key.isdecimal() for key in value):
        raise Unfit("an object of tokens by their ids")
    return [_token(value[key]) for key in sorted(value, key=int)]


def _template(value: Any) -> str | None:
    """Of several named ones transformers takes 'default'."""
    if isinstance(value, list):
        named = [entry for entry in value if isinstance(entry, dict)]
        value = next(
            (entry.get("template") for entry in named if entry.get("name") == "default"), None
        )
    if not isinstance(value, str | None):
        raise Unfit("a text or a list of named ones")
    return value


class TokenizerConfig:
    """A folder's tokenizer_config.json and its old companions, none of which need be there.

    ConfigError and CheckpointError name the file and the field of what is no use.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _json(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        return read_json(path) if path.exists() else {}

    @cached_property
    def _fields(self) -> dict[str, Any]:
        return self._json(_CONFIG)

    def flag(self, name: str) -> bool:
        """A switch; off where it is not given."""
        return read(name, self._fields.get(name, False), flag, _CONFIG)

    @property
    def tokenizer_class(self) -> str | None:
        return read("tokenizer_class", self._fields.get("tokenizer_class"), optional(text), _CONFIG)

    @cached_property
    def special_tokens(self) -> dict[str, Token]:
        """bos_token and its like. As in transformers, special_tokens_map.json has the last word
        where tokenizer_config.json lists no added tokens."""
        given = {name: (_CONFIG, value) for name, value in self._fields.items()}
        if "added_tokens_decoder" not in self._fields:
            given |= {name: (_MAP, value) for name, value in self._json(_MAP).items()}
        return {
            name: {**read(name, value, _token, file), "special": True}
            for name, (file, value) in given.items()
            if name.endswith("_token") and not isinstance(value, bool | None)
        }

    @cached_property
    def added_tokens(self) -> list[Token]:
        """What the vocabulary is extended by, in the order of ids."""
        name = "added_tokens_decoder"
        if name in self._fields:
            return read(name, self._fields[name], _tokens_by_id, _CONFIG)
        ids = {
            token: read(token, id_, whole(0), _ADDED) for token, id_ in self._json(_ADDED).items()
        }
        return [_token(token) for token in sorted(ids, key=ids.__getitem__)]

    @cached_property
    def extra_special_tokens(self) -> list[Token]:
        names = ("extra_special_tokens", "additional_special_tokens")
        name = next((name for name in names if self._fields.get(name)), names[0])
        given = read(name, self._fields.get(name) or [], list_of(_token), _CONFIG)
        return [{**token, "special": True} for token in given]

    @cached_property
    def chat_template(self) -> str | None:
        path = self._folder / "chat_template.jinja"
        if not path.is_file():
            return read("chat_template", self._fields.get("chat_template"), _template, _CONFIG)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as text: {error}") from None
