"""`megatron-lfr doctor`: whether the ranks of an allocation can train together."""
