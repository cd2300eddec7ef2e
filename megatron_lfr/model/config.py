"""The shape of a Llama, with Megatron's names, and presets by size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and initial weights of a Llama."""

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
    """Width of the feed-forward layer; by default 8/3 of --hidden-size, rounded up to a multiple of 64."""
    vocab_size: int | None = None
    """Number of tokens in the vocabulary; by default the tokenizer's."""
    make_vocab_size_divisible_by: int = 128
    """Pad the rows of the embedding, over all tensor-parallel ranks, to a multiple of this number."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weight instead of sharing the embedding's."""
    max_position_embeddings: int = 8192
    """Longest sequence, in tokens."""
    rotary_base: float = 10000.0
    """Base of the rotary positions' wavelengths (rope theta)."""
    use_rope_scaling: bool = False
    """Stretch the long wavelengths of the rotary positions as Llama 3.1 does."""
    rope_scaling_factor: float = 8.0
    """Factor by which --use-rope-scaling stretches the long wavelengths."""
    rope_low_freq_factor: float = 1.0
    """With --use-rope-scaling: wavelengths above --rope-original-max-position-embeddings divided by this number are
    stretched in full."""
    rope_high_freq_factor: float = 4.0
    """With --use-rope-scaling: wavelengths below --rope-original-max-position-embeddings divided by this number are not
    stretched."""
    rope_original_max_position_embeddings: int = 8192
    """With --use-rope-scaling: the context length, in tokens, before the stretching."""
    norm_epsilon: float = 1e-5
    """Term added to the mean square in RMSNorm."""
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
        return self.ffn_hidden_size or -(-8 * self.hidden_size // (3 * 64)) * 64

    def validate(self, tensor_model_parallel_size: int = 1) -> None:
        """Check that the sizes fit together; ValueError names the flag and the legal values."""
        self._check_ranges()
        heads, groups = self.num_attention_heads, self.query_groups
        if self.kv_channels is None and self.hidden_size % heads:
            raise ValueError(
                f"--num-attention-heads {heads}: must divide --hidden-size {self.hidden_size}, or give --kv-channels"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"--kv-channels {self.head_dim} (by default --hidden-size / --num-attention-heads): must be even "
                "for rotary positions"
            )
        if heads % groups:
            raise ValueError(f"--num-query-groups {groups}: must divide --num-attention-heads {heads}")
        if not self.rope_low_freq_factor < self.rope_high_freq_factor:
            raise ValueError(
                f"--rope-low-freq-factor {self.rope_low_freq_factor}: must be below --rope-high-freq-factor "
                f"{self.rope_high_freq_factor}"
            )
        for flag, size in (
            ("--num-query-groups", groups),
            ("--ffn-hidden-size", self.ffn_size),
            ("--make-vocab-size-divisible-by", self.make_vocab_size_divisible_by),
        ):
            if size % tensor_model_parallel_size:
                raise ValueError(
                    f"{flag} {size}: must be a multiple of --tensor-model-parallel-size {tensor_model_parallel_size}"
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
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return embeddings + self._layer_matrices() + norms

    def flops_per_token(self, seq_length: int, *, causal: bool = True) -> float:
        """Return the floating-point operations of training on one token: forward and backward, without recomputation.

        These are 6 for each weight of a matrix product (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361), and for
        the attention of each layer 12 · heads · head size · (seq_length + 1) / 2, as a causal mask leaves half of the
        score matrix. With causal=False the whole matrix counts, as in Megatron-LM: 12 · heads · head size · seq_length.
        """
        products = self._layer_matrices() + self._vocabulary() * self.hidden_size
        keys = (seq_length + 1) / 2 if causal else seq_length
        return 6.0 * products + 12.0 * self.num_layers * self.num_attention_heads * self.head_dim * keys

    def _layer_matrices(self) -> int:
        attention = 2 * (self.num_attention_heads + self.query_groups) * self.head_dim * self.hidden_size
        return self.num_layers * (attention + 3 * self.hidden_size * self.ffn_size)

    def _vocabulary(self) -> int:
        if self.vocab_size is None:
            raise ValueError("--vocab-size: give it, or --tokenizer-model")
        return self.vocab_size


MODEL_PRESETS: dict[str, ModelConfig] = {
    # Parameters with a vocabulary of 2048; the sizes below with 32000 (120M to 1.1B) and 128256 (8B, 70B).
    "demo": ModelConfig(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=352,
        max_position_embeddings=1024,
    ),
    "120M": ModelConfig(
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        ffn_hidden_size=2304,
        max_position_embeddings=4096,
    ),
    "300M": ModelConfig(
        num_layers=24,
        hidden_size=1024,
        num_attention_heads=16,
        num_query_groups=4,
        ffn_hidden_size=2816,
        max_position_embeddings=4096,
    ),
    "500M": ModelConfig(
        num_layers=24,
        hidden_size=1280,
        num_attention_heads=20,
        num_query_groups=4,
        ffn_hidden_size=3840,
        max_position_embeddings=4096,
    ),
    # TinyLlama-1.1B
    "1.1B": ModelConfig(
        num_layers=22,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=4,
        ffn_hidden_size=5632,
        max_position_embeddings=2048,
        untie_embeddings_and_output_weights=True,
    ),
    # Llama 3
    "8B": ModelConfig(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=14336,
        rotary_base=500000.0,
        untie_embeddings_and_output_weights=True,
    ),
    "70B": ModelConfig(
        num_layers=80,
        hidden_size=8192,
        num_attention_heads=64,
        num_query_groups=8,
        ffn_hidden_size=28672,
        rotary_base=500000.0,
        untie_embeddings_and_output_weights=True,
    ),
}
"""The models that --model-preset knows, by name."""
