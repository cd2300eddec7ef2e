"""Named schedules. What is the paper's and what is ours is said for each."""

from __future__ import annotations

from dataclasses import replace

from megatron_lfr.lfr.schedule import Phase, Schedule

_LFR = (
    Phase("learn", 0.40, "share"),
    Phase("focus", 0.14, "share", drop=0.5, sampling="choice", score="detrended"),
    Phase("review", 0.20, "share"),
    Phase("focus", 0.10, "share", drop=0.7, sampling="choice", score="detrended"),
    Phase("review", 0.16, "share"),
)

PRESETS: dict[str, tuple[str, Schedule]] = {
    "lfr": (
        "Ours, the default: short, weighted Focus phases on detrended scores, a Review after each, so that the run "
        "ends in Review.",
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
    "lfr-clusters": (
        "After the paper's second version: clusters instead of a threshold, visits weighted by perplexity. The "
        "lengths, k-means on the score and the weights are ours.",
        Schedule(
            (
                Phase("learn", 1),
                Phase("focus", 1, "passes", drop=0.5, selection="clusters", sampling="visits"),
                Phase("review", 1),
                Phase("focus", 5, "passes", drop=0.7, selection="clusters", sampling="visits"),
            )
        ),
    ),
    "uniform": (
        "Baseline: uniform sampling, one epoch after another.",
        Schedule((Phase("learn", 1.0, "share"),)),
    ),
    "static": (
        "Baseline: static perplexity pruning. Learn, then drop the easier half once and never look at it again.",
        Schedule((Phase("learn", 0.40, "share"), Phase("focus", 0.60, "share", drop=0.5))),
    ),
    "learn-only": (
        "Baseline: the phase boundaries of `lfr`, each phase uniform over everything. Differs from `lfr` in the "
        "selection alone.",
        Schedule(tuple(Phase("learn", phase.duration, "share") for phase in _LFR)),
    ),
    "random-focus": (
        "Control: the phases of `lfr`, each Focus by scores that were dealt to the blocks at random. As many are "
        "dropped and repeated, but not by difficulty.",
        Schedule(tuple(replace(p, score="shuffled") if p.kind == "focus" else p for p in _LFR)),
    ),
    "focus-only": (
        "Baseline: focus without review. Learn, then Focus phases with fresh scores to the end.",
        Schedule((_LFR[0], *(Phase("focus", p.duration, "share", drop=p.drop or 0.5) for p in _LFR[1:]))),
    ),
}


def preset(name: str) -> Schedule:
    """The schedule of a preset; ValueError with the legal names otherwise."""
    if name not in PRESETS:
        raise ValueError(f"unknown LFR preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name][1]
