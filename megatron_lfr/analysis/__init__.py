"""Looking back at runs: what was trained on, what was forgotten, what stands out. NumPy only, no PyTorch.

    run = open_run("runs/mine")
    for history in run.phases():
        history.block_ids, history.nll, history.steps      # one entry for each visit, in the order of training

`megatron-lfr inspect` and `megatron-lfr report` show what is computed here.
"""

from megatron_lfr.analysis.forgetting import CLASSES, EVENTS, Trajectories
from megatron_lfr.analysis.overview import RunView, view_run
from megatron_lfr.analysis.replay import PhaseHistory, Run, open_run
from megatron_lfr.analysis.similarity import BlockSet, compare
from megatron_lfr.analysis.spikes import find_spikes

__all__ = [
    "CLASSES",
    "EVENTS",
    "BlockSet",
    "PhaseHistory",
    "Run",
    "RunView",
    "Trajectories",
    "compare",
    "find_spikes",
    "open_run",
    "view_run",
]
