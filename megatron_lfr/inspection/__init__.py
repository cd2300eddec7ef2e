"""Answers questions about a run: what was in a step, how a block's loss went. No PyTorch."""
