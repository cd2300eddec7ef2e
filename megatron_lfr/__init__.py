"""Megatron-style pretraining of decoders in which a curriculum decides which blocks come next."""

__version__ = "0.1.0"
