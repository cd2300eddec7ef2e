"""Named schedules. The description of each says what is the paper's and what is ours."""

from __future__ import annotations

from dataclasses import replace

from megatron_lfr.lfr.phase import Phase
from megatron_lfr.lfr.schedule import Schedule

_LEARN = Phase("learn", 0.40, "share")
_FOCUS = Phase(
    "focus",
    0.14,
    "share",
    drop=0.5,
    sampling="choice",
    score="detrended",
    weights="capped",
    least_scored=0.8,  # of a Review that goes on with the first pass, no block has a score; after it, all have
    passes="continued",
)
_SHARPER = replace(_FOCUS, duration=0.10, drop=0.7)
_CLUSTERS = Phase("focus", 1, "passes", selection="clusters", sampling="visits", weights="perplexity")
_REVIEW, _LAST_REVIEW = (Phase("review", share, "share", passes="continued") for share in (0.20, 0.16))
_LFR = (_LEARN, _FOCUS, _REVIEW, _SHARPER, _LAST_REVIEW)

PRESETS: dict[str, tuple[str, Schedule]] = {
    "lfr": (
        "Ours, the default: short Focus phases by what each block's last loss amounts to now (detrended), in which the "
        "hardest weigh three times as much as the easiest of those that are kept, a Review after each, so that the run "
        "ends in Review. Learn and Reviews together go through the corpus as `uniform` does. A Focus that would begin "
        "in the first pass is a Review instead, and by an array `weight` one whose blocks are not worth more.",
        Schedule(_LFR),
    ),
    "lfr-v1": (
        "The paper's first version (arXiv 2409.06131v1): learn 1 epoch, focus on the harder half for one pass, "
        "review 1 epoch, focus on the hardest 30 % for five passes; threshold on the recorded loss. 4 epochs.",
        Schedule(
            (
                Phase("learn", 1),
                Phase("focus", 1, "passes", drop=0.5),
                Phase("review", 1),
                Phase("focus", 5, "passes", drop=0.7),
            )
        ),
    ),
    "lfr-v1-2reps": (
        "`lfr-v1` with the last Focus twice instead of five times: of the paper's two statements, the sentence says 5 "
        "epochs and the parenthesis reps = 2. 3.1 epochs.",
        Schedule(
            (
                Phase("learn", 1),
                Phase("focus", 1, "passes", drop=0.5),
                Phase("review", 1),
                Phase("focus", 2, "passes", drop=0.7),
            )
        ),
    ),
    "lfr-clusters": (
        "After the paper's second version: clusters instead of a threshold, visits weighted by perplexity. The "
        "lengths, k-means on the score and the weights are ours.",
        Schedule(
            (
                Phase("learn", 1),
                replace(_CLUSTERS, duration=1, drop=0.5),
                Phase("review", 1),
                replace(_CLUSTERS, duration=5, drop=0.7),
            )
        ),
    ),
    "uniform": (
        "Baseline: uniform sampling, one epoch after another.",
        Schedule((Phase("learn", 1.0, "share"),)),
    ),
    "static": (
        "Control: static pruning. The first Focus of `lfr` goes on to the end: what it drops is dropped once and never "
        "looked at again.",
        Schedule((_LEARN, replace(_FOCUS, duration=0.60))),
    ),
    "learn-only": (
        "Control: the phase boundaries of `lfr`, the order of `uniform`. Differs from `lfr` in the selection alone.",
        Schedule((_LEARN, *(Phase("learn", phase.duration, "share", passes="continued") for phase in _LFR[1:]))),
    ),
    "random-focus": (
        "Control: `lfr` with the scores of each Focus dealt to the blocks at random. As many are dropped and drawn "
        "with the same weights, but not by difficulty.",
        Schedule(tuple(replace(p, score="shuffled") if p.kind == "focus" else p for p in _LFR)),
    ),
    "focus-only": (
        "Control: focus without review. In the place of each Review of `lfr`, one more Focus as the one before it, by "
        "fresh scores.",
        Schedule((_LEARN, _FOCUS, replace(_FOCUS, duration=0.20), _SHARPER, replace(_SHARPER, duration=0.16))),
    ),
}


def preset(name: str) -> Schedule:
    """Return the schedule of a preset; ValueError with the legal names for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"unknown LFR preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name][1]
