"""Learn-Focus-Review: which blocks of a corpus a model sees next, decided by how hard they were for it.

Usable on its own, in any training loop: NumPy and this package's C++ core, no PyTorch.

    plan = preset("lfr").plan(n_blocks, seq_length, global_batch_size, train_epochs=2.5)
    curriculum = Curriculum(plan, Journal(folder, identity), seed=1)
    for step, block_ids in curriculum.steps():
        nll_sum, token_count = train_on(block_ids)
        curriculum.record(step, nll_sum, token_count)
"""

from megatron_lfr.lfr.base import BaseCurriculum, Sharing
from megatron_lfr.lfr.blend import Blend, BlendSelection, FocusScope
from megatron_lfr.lfr.curriculum import Curriculum
from megatron_lfr.lfr.follower import CurriculumFollower
from megatron_lfr.lfr.journal import UNRECORDED, Journal
from megatron_lfr.lfr.ledger import Ledger
from megatron_lfr.lfr.left_out import Selection
from megatron_lfr.lfr.phase import Phase
from megatron_lfr.lfr.plan import Plan, PlannedPhase, Segment
from megatron_lfr.lfr.presets import PRESETS, preset
from megatron_lfr.lfr.schedule import Schedule
from megatron_lfr.lfr.selection import make_order

__all__ = [
    "PRESETS",
    "UNRECORDED",
    "BaseCurriculum",
    "Blend",
    "BlendSelection",
    "Curriculum",
    "CurriculumFollower",
    "FocusScope",
    "Journal",
    "Ledger",
    "Phase",
    "Plan",
    "PlannedPhase",
    "Schedule",
    "Segment",
    "Selection",
    "Sharing",
    "make_order",
    "preset",
]
