"""`megatron-lfr benchmark`: how fast the steps of a configuration are, and where their time goes."""
