"""A tokenizer from vocab.json and merges.txt, as GPT-2 and OPT have it on the Hub: byte-level BPE.

The same ids as transformers' GPT2Tokenizer gives.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from bireme.errors import CheckpointError
from bireme.hf_config import read_json
from bireme.text.tokenizer_config import Token, TokenizerConfig

_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
# The byte that each character of a token stands for: itself, or from U+0100 on what is not printed.
BYTES = {chr(byte): byte for byte in _PRINTED} | {
    chr(0x100 + index): byte for index, byte in enumerate(_OTHERS)
}
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_MODEL_TYPES = ("gpt2", "opt")  # whose tokenizer this is where no class is named
_END: Token = {"content": "<|endoftext|>", "special": True}
_DEFAULTS = {"bos_token": _END, "eos_token": _END, "unk_token": _END}
_ORDER = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def is_here(folder: Path) -> bool:
    """True if the folder holds both files and says that they are of this kind."""
    if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return False
    if named := TokenizerConfig(folder).tokenizer_class:
        return named in _CLASSES
    config = folder / "config.json"
    return config.exists() and read_json(config).get("model_type") in _MODEL_TYPES


def load(folder: Path) -> Tokenizer:
    """CheckpointError names what is broken."""
    config = TokenizerConfig(folder)
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises bare Exception for a broken file
        raise CheckpointError(
            f"{folder} has a vocab.json or a merges.txt that cannot be read: {error}"
        ) from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=config.flag("add_prefix_space")
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = _DEFAULTS | config.special_tokens
    named = [special[name] for name in _ORDER if name in special]
    texts = {token["content"] for token in named}
    for token in (*config.added_tokens, *named, *config.extra_special_tokens):
        is_special = token["content"] in texts or token.get("special", False)
        tokenizer.add_tokens([AddedToken(**{**token, "special": is_special})])
    begin = [special["bos_token"]["content"]] * config.flag("add_bos_token")
    end = [special["eos_token"]["content"]] * config.flag("add_eos_token")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in {*begin, *end}],
    )
    return tokenizer
