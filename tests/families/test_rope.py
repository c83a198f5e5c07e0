"""Rotary frequencies and their scale are transformers' for whatever a config asks for."""

from __future__ import annotations

from typing import Any

import torch
import transformers
import zoo
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bireme.hf_config import from_hf
from bireme.models.rope import inverse_frequencies

factors = st.floats(1.0, 64.0)
originals = st.integers(16, 4096)
scalings = st.one_of(
    st.fixed_dictionaries({"rope_type": st.sampled_from(["linear", "dynamic"]), "factor": factors}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": factors,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(3.0, 8.0),
            "original_max_position_embeddings": originals,
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": factors,
            "original_max_position_embeddings": originals,
        },
        optional={
            "attention_factor": st.floats(0.5, 2.0),
            "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.25, 4.0),
            "mscale": st.floats(0.5, 1.5),
            "mscale_all_dim": st.floats(0.5, 1.5),
            "truncate": st.booleans(),
        },
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("longrope"),
            "short_factor": st.lists(factors, min_size=8, max_size=8),
            "long_factor": st.lists(factors, min_size=8, max_size=8),
            "original_max_position_embeddings": originals,
        },
        optional={"factor": factors, "attention_factor": st.floats(0.5, 2.0)},
    ),
)


@given(
    scaling=scalings,
    theta=st.sampled_from([500.0, 10000.0, 1e6]),
    max_len=st.integers(64, 8192),
    length=st.integers(1, 20000),
)
def test_drawn_frequencies_are_those_of_transformers(
    scaling: dict[str, Any], theta: float, max_len: int, length: int
) -> None:
    fields = {
        **zoo.CASES["llama2"].settings,
        "head_dim": 16,
        "max_position_embeddings": max_len,
        "rope_parameters": {"rope_theta": theta, **scaling},
    }
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**fields)
    expected, scale = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=length)
    rope = from_hf({**fields, "architectures": ["LlamaForCausalLM"]}).rope
    assert rope is not None
    torch.testing.assert_close(inverse_frequencies(rope, length), expected, rtol=1e-5, atol=0)
    assert abs(rope.attention_factor - scale) < 1e-6
