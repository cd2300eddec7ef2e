"""Asking a run folder: what was in a step, how a block's loss went. No PyTorch."""
