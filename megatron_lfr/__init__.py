"""Megatron-style pretraining of Llama, GPT-2 and relatives in which a curriculum decides which blocks come next."""

__version__ = "0.1.0"
