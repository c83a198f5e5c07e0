"""Whatever stands in a config.json, it is a model or refused in one line that names the field."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from bireme.config import ParallelConfig
from bireme.errors import ConfigError, UserError
from bireme.hf_config import from_hf
from bireme.hf_config.fields import model_type, optional_fields
from bireme.model_config import ModelConfig
from bireme.models.registry import model_layout
from bireme.models.rope import inverse_frequencies
from bireme.parallel.layout import ModelLayout

CONFIGS = {case: zoo.hf_config(zoo.CASES[case]) for case in zoo.CASES}
CONTAINERS = ("rope_parameters", "rope_scaling", "quantization_config")
IN_ROPE = (
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor",
    "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor",
)  # fmt: skip

_NUMBERS = st.one_of(
    st.integers(-3, 9), st.floats(), st.sampled_from([2**31, 2**63, 10**7, 10**30, -(10**30)])
)
_VALUES = st.one_of(st.none(), st.booleans(), _NUMBERS, st.text(max_size=4))
_JUNK = st.recursive(
    _VALUES,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
_CHANGES = st.lists(st.tuples(st.sampled_from(IN_ROPE) | st.none(), _JUNK), min_size=1, max_size=3)


def _read_names(hf: dict[str, Any]) -> set[str]:
    sizes = {"hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads",
             "n_head", "vocab_size", "num_local_experts", "num_experts_per_tok"}  # fmt: skip
    return sizes & hf.keys() | optional_fields(hf, model_type(hf)).keys()


@pytest.mark.parametrize("junk", [{"a": 1}, [[1]], "junk", [{}], float("nan"), -1, -0.5])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_value_of_no_use_is_refused_by_its_field_s_name(case: str, junk: object) -> None:
    for name in _read_names(CONFIGS[case]):
        with pytest.raises(ConfigError, match=f"config.json gives {name} ") as caught:
            from_hf({**CONFIGS[case], name: junk})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("junk", [{"a": 1}, [[1]], "junk", [{}], float("nan"), -1, -0.5])
@pytest.mark.parametrize("container", ["rope_parameters", "rope_scaling"])
def test_a_scaling_of_no_use_is_refused_by_its_field_s_name(container: str, junk: object) -> None:
    hf = {key: value for key, value in CONFIGS["llama-yarn"].items() if key != "rope_parameters"}
    scaling = {"rope_type": "yarn", "factor": 4.0}
    from_hf({**hf, container: scaling})
    for name in IN_ROPE:
        with pytest.raises(ConfigError, match=f"config.json gives {container}.*{name}"):
            from_hf({**hf, container: {**scaling, name: junk}})


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(CONFIGS)), _CHANGES, st.data())
def test_any_junk_is_a_model_or_refused(
    case: str, changes: list[tuple[str | None, Any]], data: st.DataObject
) -> None:
    hf = dict(CONFIGS[case])
    for in_rope, junk in changes:
        if in_rope:
            container = data.draw(st.sampled_from(CONTAINERS[:2]))
            before = hf.get(container)
            hf[container] = {**(before if isinstance(before, dict) else {}), in_rope: junk}
        else:
            hf[data.draw(st.sampled_from([*hf, *CONTAINERS, *_read_names(CONFIGS[case])]))] = junk
    with contextlib.suppress(UserError):
        config = from_hf(hf)
        assert isinstance(config, ModelConfig)
        if config.rope is not None:
            assert inverse_frequencies(config.rope, 64).isfinite().all()
        assert isinstance(model_layout(config, ParallelConfig(widths=(2,))), ModelLayout)
