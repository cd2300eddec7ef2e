"""Megatron-style pretraining of Llama models in which a curriculum decides which blocks come next."""

__version__ = "0.1.0"
