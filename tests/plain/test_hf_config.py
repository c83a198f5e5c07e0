"""What a config.json may say of a model, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bireme.errors import CheckpointError, ConfigError
from bireme.hf_config import eos_token_ids, from_hf, read_json

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
            {"quantization_config": {"bits": 4}},
            r"quantization_config \['bits'\]; quantised checkpoints are not supported",
        ),
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
    with pytest.raises(
        ConfigError, match="gives architectures 'LlamaForCausalLM'; a list is needed"
    ):
        from_hf({**LLAMA, "architectures": "LlamaForCausalLM"})
    assert from_hf(LLAMA).num_layers == 2


YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rope_theta": "x"}, "gives rope_theta 'x'; a number from 1.01 to"),
        ({"rope_theta": -10000.0}, "gives rope_theta -10000.0; a number"),
        ({"rope_theta": None}, "gives rope_theta None; a number"),
        ({"rope_scaling": {**YARN, "factor": "2"}}, r"rope_scaling.factor '2'; a number from 1"),
        ({"rope_scaling": {**YARN, "beta_fast": [1]}}, r"rope_scaling.beta_fast \[1\]; a number"),
        ({"rope_scaling": {"full_attention": YARN}}, "rope_scaling by full_attention"),
        ({"rope_scaling": [YARN]}, "an object is needed"),
        ({"rope_scaling": LLAMA3}, "low_freq_factor 4 and high_freq_factor 4; the second"),
        ({"head_dim": 15}, "rope turns 15 of 15 dims a head; an even number from 2 is needed"),
        ({"rms_norm_eps": "1e-6"}, "gives rms_norm_eps '1e-6'; a number from 0 to 1"),
        ({"rms_norm_eps": -1e-6}, "gives rms_norm_eps -1e-06; a number from 0 to 1"),
        ({"hidden_act": [["silu"]]}, "gives hidden_act .*; one of silu, swish"),
        ({"hidden_act": None}, "gives hidden_act None; one of silu, swish"),
        ({"attention_bias": 1}, "gives attention_bias 1; true or false"),
        ({"dtype": ["float16"]}, "gives dtype .*; a name"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(
    fields: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        from_hf({**LLAMA, **fields})


MIXTRAL = {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_key_value_heads": 4}
QWEN3_MOE = {
    **MIXTRAL, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}  # fmt: skip
GEMMA2 = {**LLAMA, "architectures": ["Gemma2ForCausalLM"]}


@pytest.mark.parametrize(
    ("hf", "says"),
    [
        ({**MIXTRAL, "num_local_experts": 2, "num_experts_per_tok": 3}, "3 exceeds the 2 experts"),
        ({**QWEN3_MOE, "decoder_sparse_step": 0}, "decoder_sparse_step 0; a whole number from 1"),
        (
            {**QWEN3_MOE, "mlp_only_layers": [0, "1"]},
            "mlp_only_layers .*; a list with a whole number",
        ),
        (
            {**GEMMA2, "layer_types": ["chunked_attention"] * 2},
            "layer_types .*; a list with one of",
        ),
        ({**GEMMA2, "layer_types": ["full_attention"]}, "1 layer_types are given for 2 layers"),
        ({**GEMMA2, "attn_logit_softcapping": 0}, "attn_logit_softcapping 0; a number from"),
        ({**GEMMA2, "sliding_window": -4}, "sliding_window -4; a whole number from 1"),
    ],
)
def test_so_is_one_of_another_family(hf: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_hf(hf)


@pytest.mark.parametrize("eos", ["2", 2.0, True, -1, 300, [2, None], [[2]], {}])
def test_ids_that_end_an_answer_are_of_the_vocabulary(eos: object) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json gives eos_token_id .* from 0 to 299"):
        eos_token_ids({"eos_token_id": eos}, {}, 300)
    with pytest.raises(ConfigError, match=r"^generation_config\.json gives eos_token_id"):
        eos_token_ids({"eos_token_id": 2}, {"eos_token_id": eos}, 300)


def test_a_generation_config_says_what_ends_an_answer_before_config_does() -> None:
    assert eos_token_ids({"eos_token_id": 2}, {}, 300) == {2}
    assert eos_token_ids({"eos_token_id": 2}, {"eos_token_id": [3, 4]}, 300) == {3, 4}
    assert eos_token_ids({}, {}, 300) == frozenset()


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "config.json", tmp_path / "folder.json", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match=f"{path} is no file; a JSON file is needed"):
            read_json(path)
