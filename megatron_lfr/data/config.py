"""Which corpus a run reads, and how documents meet inside a block."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """The corpus of a run."""

    data_path: list[str] = field(default_factory=list)
    """Prefixes of the preprocessed corpus (`<prefix>.bin`, `<prefix>.idx`), one for each domain."""
    split: str = "99,1,0"
    """Shares of each prefix's documents for training, validation and test, in this order."""
    seq_length: int = 2048
    """Tokens of a block: one training sequence."""
    tokenizer_model: str | None = None
    """The tokenizer that the corpus was made with: a `tokenizers` JSON file, a folder that holds tokenizer.json, or
    `bytes`. Gives the vocabulary's size and the end-of-document token."""
    eod_token: str | None = None
    """The tokenizer's end-of-document token, where its name is not one of the usual ones."""
    eod_mask_loss: bool = False
    """Do not train on predicting what follows an end-of-document token."""
    reset_position_ids: bool = False
    """Count positions anew after each end-of-document token."""
    reset_attention_mask: bool = False
    """Tokens attend to their own document only."""
    prefetch: int = 2
    """Steps that the loader reads ahead."""

    def validate(self) -> None:
        if not self.data_path:
            raise ValueError("--data-path: give at least one prefix of a preprocessed corpus")
        for word in self.data_path:
            if _is_number(word):
                raise ValueError(f"--data-path {word}: weights are not supported, every block is in the corpus once")
        if self.seq_length < 1:
            raise ValueError(f"--seq-length {self.seq_length}: must be at least 1")
        if self.prefetch < 1:
            raise ValueError(f"--prefetch {self.prefetch}: must be at least 1")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
