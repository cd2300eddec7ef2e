"""Evaluation of a trained run: its losses on a corpus, and its results on tasks and in lm-eval."""
