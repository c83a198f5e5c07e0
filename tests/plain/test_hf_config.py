"""What a config.json may say of a model's sizes."""

from __future__ import annotations

import pytest

from bireme.errors import ConfigError
from bireme.hf_config import from_hf

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "vocab_size": 300,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize("value", [0, -4, "4", 4.0, True, 10**15])
@pytest.mark.parametrize(
    "name",
    ["hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads",
     "num_key_value_heads", "head_dim", "max_position_embeddings"],
)  # fmt: skip
def test_a_size_that_is_no_size_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"gives {name} .*; a whole number from 1 to"):
        from_hf({**LLAMA, name: value})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "'gptq'; quantised checkpoints are not",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false'; true or false is needed"),
    ],
)
def test_what_would_be_another_model_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_hf({**LLAMA, **fields})


def test_architectures_must_be_a_list() -> None:
    with pytest.raises(ConfigError, match="a list of names is needed"):
        from_hf({**LLAMA, "architectures": "LlamaForCausalLM"})
    assert from_hf(LLAMA).num_layers == 2
