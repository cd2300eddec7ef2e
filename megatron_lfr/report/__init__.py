"""`megatron-lfr report` shows one or several runs on one HTML page."""
