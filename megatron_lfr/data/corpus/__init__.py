"""Reads a corpus: indexed datasets, numbered blocks, batches, and the tokenizer that its ids belong to."""
