"""Corpora: `preprocess` makes `.bin`/`.idx` pairs of text, `corpus` reads them as the blocks and batches of a run.

Import from the modules; `corpus.loader` alone needs torch.
"""
