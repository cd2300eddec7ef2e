"""The shape of a decoder, with Megatron's names: by default a Llama's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

RopeScaling = Literal["llama3", "linear", "dynamic", "yarn"]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes, parts and initial weights of a decoder; by default its parts are those of a Llama."""

    num_layers: int = 0
    """Number of transformer layers. Required, unless --model-preset gives it."""
    hidden_size: int = 0
    """Width of the residual stream. Required, unless --model-preset gives it."""
    num_attention_heads: int = 0
    """Number of query heads. Required, unless --model-preset gives it."""
    num_query_groups: int | None = None
    """Number of key and value heads, each shared by a group of query heads; by default one for each query head."""
    kv_channels: int | None = None
    """Size of an attention head; by default --hidden-size / --num-attention-heads."""
    ffn_hidden_size: int | None = None
    """Width of the feed-forward layer; by default 8/3 of --hidden-size, rounded up to a multiple of 64, or with
    --no-swiglu 4 times --hidden-size."""
    swiglu: bool = True
    """Gate the feed-forward layer by SwiGLU. With --no-swiglu it has no gate, and its activation is GELU in the
    approximation by tanh, as GPT-2's."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """What norms compute. LayerNorm has a bias."""
    norm_after_sublayers: bool = False
    """Apply norms to what attention and feed-forward layers return instead of to their inputs, as OLMo 2 does."""
    qk_layernorm: bool = False
    """Apply a norm to queries and keys, to each head by itself, as Qwen3 does."""
    qk_layernorm_across_heads: bool = False
    """With --qk-layernorm: apply it to all heads of a token together, as OLMo 2 does."""
    disable_bias_linear: bool = True
    """Leave out the biases of all linear layers. With --no-disable-bias-linear all of them have one, as GPT-2's do."""
    add_qkv_bias: bool = False
    """With --disable-bias-linear: give queries, keys and values a bias, as Qwen2 does."""
    add_attention_output_bias: bool = False
    """With --disable-bias-linear: give the linear layer after attention a bias."""
    add_mlp_bias: bool = False
    """With --disable-bias-linear: give the linear layers of the feed-forward a bias."""
    sliding_window: int | None = None
    """Number of tokens that a token attends to: itself and those just before it, as in Mistral. By default, all earlier
    ones. Megatron's --window-size counts one less."""
    vocab_size: int | None = None
    """Number of tokens in the vocabulary; by default the tokenizer's."""
    make_vocab_size_divisible_by: int = 128
    """Pad the rows of the embedding, over all tensor-parallel ranks, to a multiple of this number."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weight instead of sharing the embedding's."""
    max_position_embeddings: int = 8192
    """Longest sequence, in tokens."""
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    """How the model knows positions: by rotating queries and keys, or by an embedding for each, as GPT-2's."""
    rotary_base: float = 10000.0
    """Base of the rotary positions' wavelengths (rope theta)."""
    use_rope_scaling: bool = False
    """Stretch the long wavelengths of the rotary positions, by default as Llama 3.1 does."""
    rope_scaling_type: RopeScaling = "llama3"
    """With --use-rope-scaling: how wavelengths are stretched. linear stretches all of them alike; dynamic only those of
    a sequence beyond --rope-original-max-position-embeddings, the more the longer it is; yarn
    (https://arxiv.org/abs/2309.00071) and llama3 the long ones."""
    rope_scaling_factor: float = 8.0
    """Factor by which --use-rope-scaling stretches the wavelengths."""
    rope_low_freq_factor: float = 1.0
    """With --rope-scaling-type llama3: wavelengths above --rope-original-max-position-embeddings divided by this number
    are stretched in full."""
    rope_high_freq_factor: float = 4.0
    """With --rope-scaling-type llama3: wavelengths below --rope-original-max-position-embeddings divided by this number
    are not stretched."""
    rope_original_max_position_embeddings: int = 8192
    """With --use-rope-scaling: the context length, in tokens, before the stretching."""
    yarn_beta_fast: float = 32.0
    """With --rope-scaling-type yarn: wavelengths that turn at least this often in the original context are not
    stretched."""
    yarn_beta_slow: float = 1.0
    """With --rope-scaling-type yarn: wavelengths that turn at most this often in the original context are stretched in
    full."""
    yarn_truncate: bool = True
    """With --rope-scaling-type yarn: round the range between the two outwards, to whole channels."""
    yarn_attention_factor: float | None = None
    """With --rope-scaling-type yarn: factor on rotated queries and keys; by default 1 and a tenth of the natural
    logarithm of --rope-scaling-factor."""
    norm_epsilon: float = 1e-5
    """Term added to the mean square, or to the variance, in norms."""
    final_logit_softcapping: float = 0.0
    """Bound c on the logits, which become c · tanh(logits / c); Gemma 2 has 30 (https://arxiv.org/abs/2408.00118). 0
    sets no bound."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; it is divided by √(2 · layers) for the layers that write into the
    residual stream."""

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Number of key and value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer."""
        default = -(-8 * self.hidden_size // (3 * 64)) * 64 if self.swiglu else 4 * self.hidden_size
        return self.ffn_hidden_size or default

    @property
    def has_rope(self) -> bool:
        """Whether positions are rotary."""
        return self.position_embedding_type == "rope"

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.add_qkv_bias or not self.disable_bias_linear

    @property
    def has_attention_output_bias(self) -> bool:
        """Whether the linear layer after attention has a bias."""
        return self.add_attention_output_bias or not self.disable_bias_linear

    @property
    def has_mlp_bias(self) -> bool:
        """Whether the linear layers of the feed-forward have a bias."""
        return self.add_mlp_bias or not self.disable_bias_linear

    def window(self, seq_length: int) -> int | None:
        """Return the sliding window of sequences of `seq_length` tokens; None where tokens see all earlier ones."""
        return None if self.sliding_window is None or self.sliding_window >= seq_length else self.sliding_window

    def canonical(self) -> ModelConfig:
        """Return the same model with the sizes that defaults stand for, and with defaults where nothing depends on a
        setting."""
        biases = {
            "add_qkv_bias": self.has_qkv_bias,
            "add_attention_output_bias": self.has_attention_output_bias,
            "add_mlp_bias": self.has_mlp_bias,
        }
        has_all = all(biases.values())
        changes: dict[str, Any] = {
            "num_query_groups": self.query_groups,
            "kv_channels": self.head_dim,
            "ffn_hidden_size": self.ffn_size,
            "qk_layernorm_across_heads": self.qk_layernorm and self.qk_layernorm_across_heads,
            "disable_bias_linear": not has_all,
            **(dict.fromkeys(biases, False) if has_all else biases),
            **{name: _DEFAULTS[name] for name in _without_effect(self)},
        }
        return dataclasses.replace(self, **changes)

    def validate(self, tensor_model_parallel_size: int = 1) -> None:
        """Check that the sizes fit together; ValueError names the flag and the legal values."""
        self._check_ranges()
        heads, groups = self.num_attention_heads, self.query_groups
        if self.kv_channels is None and self.hidden_size % heads:
            raise ValueError(
                f"--num-attention-heads {heads}: must divide --hidden-size {self.hidden_size}, or give --kv-channels"
            )
        if self.has_rope and self.head_dim % 2:
            raise ValueError(
                f"--kv-channels {self.head_dim} (by default --hidden-size / --num-attention-heads): must be even "
                "for rotary positions"
            )
        if self.use_rope_scaling and not self.has_rope:
            raise ValueError(
                f"--use-rope-scaling: needs --position-embedding-type rope, not {self.position_embedding_type}"
            )
        if self.qk_layernorm_across_heads and self.normalization != "RMSNorm":
            raise ValueError(f"--qk-layernorm-across-heads: needs --normalization RMSNorm, not {self.normalization}")
        if heads % groups:
            raise ValueError(f"--num-query-groups {groups}: must divide --num-attention-heads {heads}")
        if not self.rope_low_freq_factor < self.rope_high_freq_factor:
            raise ValueError(
                f"--rope-low-freq-factor {self.rope_low_freq_factor}: must be below --rope-high-freq-factor "
                f"{self.rope_high_freq_factor}"
            )
        if not self.yarn_beta_slow < self.yarn_beta_fast:
            raise ValueError(
                f"--yarn-beta-slow {self.yarn_beta_slow}: must be below --yarn-beta-fast {self.yarn_beta_fast}"
            )
        for flag, size in (
            ("--num-query-groups", groups),
            ("--ffn-hidden-size", self.ffn_size),
            ("--make-vocab-size-divisible-by", self.make_vocab_size_divisible_by),
        ):
            if size % tensor_model_parallel_size:
                divisors = ", ".join(str(n) for n in range(1, min(size, 1024) + 1) if size % n == 0)
                raise ValueError(
                    f"{flag} {size}: must be a multiple of --tensor-model-parallel-size {tensor_model_parallel_size}; "
                    f"legal sizes: {divisors}"
                )

    def _check_ranges(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if isinstance(size, int) and size >= 2**31:
                raise ValueError(f"--{name.replace('_', '-')} {size}: must be below 2^31")
        for flag, required in (
            ("--num-layers", self.num_layers),
            ("--hidden-size", self.hidden_size),
            ("--num-attention-heads", self.num_attention_heads),
        ):
            if required < 1:
                raise ValueError(f"{flag} {required}: must be at least 1; give it, or --model-preset")
        for flag, value in (
            ("--num-query-groups", self.num_query_groups),
            ("--kv-channels", self.kv_channels),
            ("--ffn-hidden-size", self.ffn_hidden_size),
            ("--sliding-window", self.sliding_window),
            ("--vocab-size", self.vocab_size),
            ("--make-vocab-size-divisible-by", self.make_vocab_size_divisible_by),
            ("--max-position-embeddings", self.max_position_embeddings),
            ("--rope-original-max-position-embeddings", self.rope_original_max_position_embeddings),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{flag} {value}: must be at least 1")
        for flag, number in (
            ("--rotary-base", self.rotary_base),
            ("--rope-scaling-factor", self.rope_scaling_factor),
            ("--rope-low-freq-factor", self.rope_low_freq_factor),
            ("--yarn-beta-fast", self.yarn_beta_fast),
            ("--yarn-beta-slow", self.yarn_beta_slow),
            ("--yarn-attention-factor", 1.0 if self.yarn_attention_factor is None else self.yarn_attention_factor),
            ("--norm-epsilon", self.norm_epsilon),
            ("--init-method-std", self.init_method_std),
        ):
            if not 0 < number < float("inf"):
                raise ValueError(f"{flag} {number}: must be positive and finite")
        if self.final_logit_softcapping and not 1 <= self.final_logit_softcapping < float("inf"):
            raise ValueError(
                f"--final-logit-softcapping {self.final_logit_softcapping}: must be at least 1, or 0 for none"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all tensor-parallel ranks: the size of the vocabulary, rounded up. Unlike
        Megatron's, it is the same for every number of ranks, so that a checkpoint fits any of them."""
        multiple = self.make_vocab_size_divisible_by
        return -(-self._vocabulary() // multiple) * multiple

    def num_parameters(self) -> int:
        """Return the number of the model's weights, without the padding of the vocabulary."""
        embeddings = (1 + self.untie_embeddings_and_output_weights) * self._vocabulary() * self.hidden_size
        positions = 0 if self.has_rope else self.max_position_embeddings * self.hidden_size
        return embeddings + positions + self.num_layers * self.layer_parameters() + self.norm_parameters

    def layer_parameters(self, tensor_ranks: int = 1) -> int:
        """Return the number of a layer's weights that a tensor-parallel rank holds."""
        queries, keys = self.num_attention_heads * self.head_dim, self.query_groups * self.head_dim
        spread = self._layer_matrices() + self.has_qkv_bias * (queries + 2 * keys)
        spread += self.has_mlp_bias * (1 + self.swiglu) * self.ffn_size
        copied = 2 * self.norm_parameters
        copied += (self.has_attention_output_bias + self.has_mlp_bias) * self.hidden_size
        if self.qk_layernorm_across_heads:
            spread += queries + keys
        elif self.qk_layernorm:
            copied += 2 * self.head_dim * self._weights_of_norms
        return spread // tensor_ranks + copied

    @property
    def norm_parameters(self) -> int:
        """Number of weights of a norm of the residual stream."""
        return self._weights_of_norms * self.hidden_size

    @property
    def _weights_of_norms(self) -> int:
        return 2 if self.normalization == "LayerNorm" else 1

    def flops_per_token(self, seq_length: int, *, causal: bool = True) -> float:
        """Return the floating-point operations of training on one token: forward and backward, without recomputation.

        These are 6 for each weight of a matrix product (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361), and for
        the attention of each layer 12 · heads · head size · (seq_length + 1) / 2, as a causal mask leaves half of the
        score matrix. With causal=False the whole matrix counts, as in Megatron-LM: 12 · heads · head size · seq_length.
        """
        keys = (seq_length + 1) / 2 if causal else seq_length
        return 6.0 * self.product_parameters + 12.0 * self.num_layers * self.num_attention_heads * self.head_dim * keys

    @property
    def product_parameters(self) -> int:
        """Number of weights of the matrix products that each token takes."""
        return self.num_layers * self._layer_matrices() + self._vocabulary() * self.hidden_size

    def _layer_matrices(self) -> int:
        attention = 2 * (self.num_attention_heads + self.query_groups) * self.head_dim * self.hidden_size
        return attention + (2 + self.swiglu) * self.hidden_size * self.ffn_size

    def _vocabulary(self) -> int:
        if self.vocab_size is None:
            raise ValueError("--vocab-size: give it, or --tokenizer-model")
        return self.vocab_size


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
_SCALINGS: dict[str, tuple[RopeScaling, ...]] = {
    "rope_scaling_type": ("llama3", "linear", "dynamic", "yarn"),
    "rope_scaling_factor": ("llama3", "linear", "dynamic", "yarn"),
    "rope_low_freq_factor": ("llama3",),
    "rope_high_freq_factor": ("llama3",),
    "rope_original_max_position_embeddings": ("llama3", "dynamic", "yarn"),
    "yarn_beta_fast": ("yarn",),
    "yarn_beta_slow": ("yarn",),
    "yarn_truncate": ("yarn",),
    "yarn_attention_factor": ("yarn",),
}
"""Settings of how rotary positions are stretched, and the ways of stretching that they matter to."""


def _without_effect(config: ModelConfig) -> list[str]:
    """Return the settings of positions that change nothing in a model."""
    names = [] if config.has_rope else ["rotary_base"]
    kind = config.rope_scaling_type if config.use_rope_scaling else None
    return [*names, *(name for name, kinds in _SCALINGS.items() if kind not in kinds)]
