"""The sentence of a study, on made-up results."""

from __future__ import annotations

from megatron_lfr.study.statistics import Interval
from megatron_lfr.study.verdict import Evidence, decide


def evidence(
    arm: str,
    mean: float,
    half: float | None,
    is_primary: bool = True,
    documents: float = 0.001,
    adjusted_p: float | None = None,
) -> Evidence:
    """Make an arm whose interval over seeds is mean ± half (None: one seed), that over documents mean ± documents."""
    seeds = Interval(mean, None, None, 1) if half is None else Interval(mean, mean - half, mean + half, 3)
    return Evidence(arm, seeds, Interval(mean, mean - documents, mean + documents, 50), is_primary, adjusted_p)


def kind(*arms: Evidence) -> str:
    return decide("S", "uniform", arms, 0.01).kind


def test_an_arm_that_is_better_for_other_seeds_and_other_documents_pays() -> None:
    verdict = decide("S", "uniform", [evidence("lfr", -0.1, 0.02), evidence("static", 0.0, 0.5)], 0.01)
    assert verdict.kind == "pays"
    assert verdict.sentence == (
        "S: lfr pays: its held-out loss is 0.100 nats below that of uniform at equal compute (95 % -0.120 to -0.080 "
        "over 3 seeds; primary)."
    )


def test_better_by_less_than_is_worth_having_does_not_pay() -> None:
    assert kind(evidence("lfr", -0.005, 0.002)) == "nothing pays"


def test_documents_that_could_be_others_decide_nothing() -> None:
    assert kind(evidence("lfr", -0.1, 0.02, documents=0.2)) == "not decided"


def test_seeds_that_could_be_others_decide_nothing() -> None:
    assert kind(evidence("lfr", -0.1, 0.2)) == "not decided"


def test_one_seed_decides_nothing() -> None:
    verdict = decide("S", "uniform", [evidence("lfr", -1.0, None)], 0.01)
    assert (verdict.kind, "1 seed there" in verdict.sentence) == ("not decided", True)


def test_secondary_contrasts_pay_after_holm_alone() -> None:
    assert kind(evidence("static", -0.1, 0.02, is_primary=False, adjusted_p=0.2)) == "not decided"
    assert kind(evidence("static", -0.1, 0.02, is_primary=False, adjusted_p=0.01)) == "pays"


def test_a_primary_contrast_comes_before_a_better_secondary_one() -> None:
    arms = [evidence("static", -0.3, 0.02, is_primary=False, adjusted_p=0.01), evidence("lfr", -0.1, 0.02)]
    assert "lfr pays" in decide("S", "uniform", arms, 0.01).sentence


def test_nothing_pays_where_a_gain_is_excluded_for_all() -> None:
    assert kind(evidence("lfr", 0.02, 0.01), evidence("static", 0.1, 0.05)) == "nothing pays"
    assert kind(evidence("lfr", 0.02, 0.01), evidence("static", 0.1, 0.2)) == "not decided"


def test_nothing_is_decided_where_an_arm_is_missing() -> None:
    arms = [evidence("lfr", 0.02, 0.01)]
    verdict = decide("S", "uniform", arms, 0.01, ["static"])
    assert verdict.kind == "not decided"
    assert (
        verdict.sentence == "S: not decided: no result yet of static; of the others, a gain of 0.01 nats is excluded."
    )
    assert decide("S", "uniform", [evidence("lfr", -0.1, 0.02)], 0.01, ["static"]).kind == "pays"


def test_without_evidence_nothing_is_decided() -> None:
    assert kind() == "not decided"
