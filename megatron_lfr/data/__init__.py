"""Corpora: `preprocess` turns text into `.bin`/`.idx` pairs, `corpus` reads them as the blocks and batches of a run.

Import from the modules; `corpus.loader` alone needs torch.
"""
