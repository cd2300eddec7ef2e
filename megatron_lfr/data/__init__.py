"""Corpora: text to `.bin`/`.idx`, and from there to the blocks and batches of a run.

Import from the modules: `indexed`, `blocks`, `tokenizer` and `preprocess` do without torch, `loader` needs it.
"""
