"""Any head counts, vocabulary and layout: what hypothesis draws is transformers' model too."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zoo
from harness import engine_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bireme.checkpoint.prepared import prepare_model
from bireme.verify import transformers_reference, verify

# names of the sizes by config class: layers, heads, width, MLP columns (None: always 4 * width)
_SPELLINGS = {
    "LlamaConfig": ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size"),
    "Phi3Config": ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size"),
    "Qwen3Config": ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size"),
    "GPT2Config": ("n_layer", "n_head", "n_embd", "n_inner"),
    "BloomConfig": ("n_layer", "n_head", "hidden_size", None),
    "OPTConfig": ("num_hidden_layers", "num_attention_heads", "hidden_size", "ffn_dim"),
}
_HAS_GQA = ("LlamaConfig", "Phi3Config", "Qwen3Config")


@dataclass(frozen=True)
class Drawn:
    case: zoo.Case
    widths: tuple[int, ...]
    vocab_size: int


@st.composite
def shapes(draw: st.DrawFn) -> Drawn:
    config_class = draw(st.sampled_from(sorted(_SPELLINGS)))
    num_kv_heads = draw(st.integers(1, 5))
    heads = num_kv_heads * draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(2, 5))
    stages = draw(st.integers(1, 3))
    widths = draw(st.lists(st.integers(1, min(heads, 5)), min_size=stages, max_size=stages))
    vocab = draw(st.integers(65, 400))
    layers = draw(st.integers(stages, 4))
    columns = draw(st.integers(max(widths), 90))
    sizes = zip(_SPELLINGS[config_class], (layers, heads, heads * head_dim, columns), strict=True)
    fields: dict[str, Any] = {name: size for name, size in sizes if name}
    fields |= {"vocab_size": vocab, "tie_word_embeddings": draw(st.booleans())}
    if config_class in _HAS_GQA:
        fields |= {"num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    return Drawn(zoo.Case(config_class, fields, seed=draw(st.integers(0, 9))), tuple(widths), vocab)


@pytest.mark.usefixtures("local_ranks", "checkpoints")
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(drawn=shapes())
def test_a_drawn_model_at_a_drawn_layout_computes_what_transformers_does(drawn: Drawn) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(str(zoo.write(drawn.case, Path(folder))))
        prompts = zoo.prompts(drawn.vocab_size, (9, 4))
        reference = transformers_reference(model, prompts, 3, "float32")
        found = verify(model, engine_config(*drawn.widths), prompts, reference=reference)
    assert found.is_same, found
