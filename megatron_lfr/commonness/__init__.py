"""`megatron-lfr commonness`: what a corpus holds often, and what it holds that is like no text, before training."""
