"""Writes a corpus: `megatron-lfr preprocess` (command.py) and `megatron-lfr merge` (merge.py)."""
