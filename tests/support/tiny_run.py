"""The command line of a run that takes seconds."""

from __future__ import annotations

VOCAB = 64
STOPPED = 75
"""Exit code of a run that a signal or a limit stopped."""


def tiny_flags(corpus: list[str]) -> list[str]:
    """Return the flags of a tiny run over `corpus`."""
    return [
        *("--data-path", *corpus),
        *("--split", "90,10,0"),
        *("--vocab-size", str(VOCAB), "--make-vocab-size-divisible-by", "1"),
        *(
            "--num-layers",
            "2",
            "--hidden-size",
            "32",
            "--num-attention-heads",
            "4",
            "--num-query-groups",
            "2",
        ),
        *("--ffn-hidden-size", "64", "--seq-length", "16", "--max-position-embeddings", "16"),
        *("--micro-batch-size", "4", "--global-batch-size", "8", "--lr", "1e-2"),
        *("--train-epochs", "2.5", "--log-interval", "4"),
    ]
