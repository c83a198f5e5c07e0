"""What a model is: its shape and behaviour, whatever its file called them (`hf_config/`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base, rotated share of the head, and the scaling of long contexts.

    `original_max_len` is the length that the model was trained at before scaling (tokens).
    """

    theta: float = 10000.0
    rotary_dim: int
    kind: str = "default"
    factor: float = 1.0
    original_max_len: int
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts; `is_sparse[i]` says whether layer i routes or has one dense MLP."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    is_sparse: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model's shape and behaviour; sizes in elements, lengths in tokens.

    `windows[i]` is layer i's sliding window (None: full attention).
    `position_offset` is added to a position before the learned position table is read (OPT: 2).
    """

    architecture: str
    model_type: str
    dtype: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    activation: str
    norm_eps: float
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    attention_scale: float
    rope: RopeConfig | None = None
    moe: MoeConfig | None = None
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_mlp_bias: bool = False
    has_norm_params: bool = True
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_dim: int
    position_offset: int = 0
    is_norm_first: bool = True
    has_final_norm: bool = True
    has_parallel_residual: bool = False
    has_residual_after_norm: bool = False
    has_scale_by_layer: bool = False

    @property
    def max_model_len(self) -> int:
        """The longest context (tokens) that the positions are made for, scaling included."""
        rope = self.rope
        if rope is None:
            return self.max_position_embeddings
        if rope.kind in ("linear", "dynamic"):
            return int(self.max_position_embeddings * rope.factor)
        if rope.kind == "yarn":
            return max(self.max_position_embeddings, int(rope.original_max_len * rope.factor))
        return self.max_position_embeddings
