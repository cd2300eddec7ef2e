"""`megatron-lfr study` compares ways of choosing data: arms, at equal compute, over seeds, sizes and learning rates."""
