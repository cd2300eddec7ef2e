"""Learn-Focus-Review in a plain PyTorch loop: nothing of megatron_lfr but the curriculum.

    python examples/plain_pytorch_loop.py FILE.txt

Trains a small byte-level GRU on a text file. The loop asks the curriculum which blocks come next and hands back
their losses; the rest is ordinary PyTorch.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from megatron_lfr.lfr import Curriculum, Journal, preset

SEQ_LENGTH, BATCH = 64, 16


class ByteModel(nn.Module):
    """Predicts the next byte."""

    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, hidden)
        self.rnn = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 256)

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embedding(tokens_BS))[0])


def main(path: str) -> Counter[int]:
    """Train, and return how often each block was visited."""
    torch.manual_seed(0)
    text = torch.from_numpy(np.fromfile(path, np.uint8).astype(np.int64))
    n_blocks = (len(text) - 1) // SEQ_LENGTH
    plan = preset("lfr").plan(n_blocks, SEQ_LENGTH, BATCH, train_epochs=4.0)
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    visits: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        curriculum = Curriculum(plan, Journal(Path(folder), {"corpus": path}), seed=1)
        for step, block_ids in curriculum.steps():
            ids = block_ids[block_ids >= 0]  # the last step of a phase may be padded with -1
            blocks = torch.stack([text[i * SEQ_LENGTH : (i + 1) * SEQ_LENGTH + 1] for i in ids])
            logits = model(blocks[:, :-1])
            token_nll = F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none")
            token_nll.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            nll_sum = token_nll.detach().sum(1).numpy()
            curriculum.record(step, nll_sum, np.full(len(ids), SEQ_LENGTH))
            visits.update(ids.tolist())
            if curriculum.at_boundary:
                kind = curriculum.plan.at_step(step).phase.kind
                print(f"{kind:7s} ends at step {step + 1}: loss {token_nll.mean():.3f}")
    return visits


if __name__ == "__main__":
    main(sys.argv[1])
