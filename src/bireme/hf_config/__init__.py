"""Reads a Hugging Face config.json.

`from_hf` is the one place that meets that file's aliases, defaults and old spellings
(`rope_scaling`, `torch_dtype`, `n_embd`...). Everything behind it reads `ModelConfig`.
"""

from bireme.hf_config.fields import MODEL_TYPES
from bireme.hf_config.json_file import read_json
from bireme.hf_config.model import eos_token_ids, from_hf

__all__ = ["MODEL_TYPES", "eos_token_ids", "from_hf", "read_json"]
