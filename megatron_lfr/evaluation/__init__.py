"""What a trained run is worth: losses of a corpus, tasks, lm-eval."""
