"""`megatron-lfr commonness` finds what a corpus holds often, and what in it is like no text, before training."""
