"""All figures of the report, from made-up results whose figures are known."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lfr.commonness.junk import RULE
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.study.between import learned_at
from megatron_lfr.study.definition import CANDIDATE, Contrast, read_study
from megatron_lfr.study.page import make_markdown, make_page
from megatron_lfr.study.results import Result, Results, pick_candidate, resolve
from megatron_lfr.study.summary import summarize
from support.study_samples import tiny_study, write_study

SEQ = 16
SLOPE = 0.7
"""Nats that the made-up loss of uniform sampling falls with each e-fold of compute."""
GAIN = {"uniform": 0.0, "best": 0.4, "lfr": 0.3, "static": 0.01}
"""Nats that each arm's loss is below uniform's at seed 1; with each further seed a hundredth more."""


@pytest.fixture(scope="module")
def results(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return made-up results of four arms at seeds 0 to 3, and of uniform sampling at three budgets."""
    folder = tmp_path_factory.mktemp("results")
    content = tiny_study(corpus)
    content["seeds"] = [0, 1, 2, 3]
    content["arms"] = {name: {"settings": {"lfr_schedule": "uniform"}} for name in GAIN}
    content["upper_reference"] = "best"
    content["candidate"] = {"among": ["lfr", "static"], "seeds": [0]}
    content["contrasts"] = {"primary": ["candidate"], "secondary": ["static", "lfr", "static - lfr"]}
    study = read_study(write_study(folder / "study.yaml", content))
    blocks = BlockDataset(corpus, SEQ, "1").train.num_blocks
    runs = [made(folder, arm, seed, 1.0, blocks) for arm in GAIN for seed in range(4)]
    runs += [made(folder, "uniform", seed, point, blocks) for point in (0.5, 2.0) for seed in range(4)]
    return Results(study, runs, [open_run("lfr", 9)], 16)


def open_run(arm: str, seed: int) -> dict[str, Any]:
    names = {"arm": arm, "corpus": "toy", "size": "S", "rate": "cosine", "seed": seed, "compute_point": 1.0}
    return {"name": f"toy.S.cosine.{arm}.s{seed}", **names}


def made(folder: Path, arm: str, seed: int, point: float, blocks: int) -> Result:
    gain = 0.0 if arm == "uniform" else GAIN[arm] + 0.01 * seed
    loss = 4.0 + 0.05 * seed - SLOPE * math.log(point) - gain
    dropped = np.packbits(np.arange(16) % 4 < 2)
    path = folder / f"{arm}{seed}{point}.npz"
    held_out = np.full(blocks, loss, np.float32)
    candidates, starts = np.packbits(np.ones(16, np.bool_)), np.array([0, 16])
    np.savez(path, held_out=held_out, dropped_1=dropped, candidates_1=candidates, starts_1=starts)
    content: dict[str, Any] = {
        "name": f"{arm}{seed}",
        "arm": arm,
        "corpus": "toy",
        "size": "S",
        "rate": "cosine",
        "seed": seed,
        "compute_point": point,
        "settings": {"seq_length": SEQ},
        "held_out": {"macro": loss, "domains": {"easy": loss - 1, "hard": loss + 1}},
        "tasks": {"quiz.jsonl": {"acc": 0.25, "answer_logprob": -2.0 - seed}},
        "compute": {"total": 1000 * point, "preparation": 0.0, "rescoring": 0.0, "preparation_cpu_seconds": 0.0},
        "blocks": 16,
        "phases": [
            {"phase": "0 learn", "kind": "learn", "samples": 8, "domains": {"easy": 2, "hard": 6}, "planted": None}
        ],
        "forgetting": {"steady": 4, "learned": 12},
        "learning": {"easy": [4.0, 2.0, 1.0], "hard": [4.0, 3.9, 1.0]},
        "train_seconds": 1.0,
        "commit": "abc",
    }
    return Result(content, path)


def test_the_rule_picks_the_lowest_loss_at_its_seeds(results: Results) -> None:
    assert results.study.candidate is not None
    assert pick_candidate(results, results.study.candidate) == "lfr"
    fewer = Results(results.study, [run for run in results.runs if (run.arm, run.seed) != ("static", 0)], [], 16)
    assert pick_candidate(fewer, results.study.candidate) is None, "not before all of its runs are done"


def test_the_candidate_takes_the_place_of_its_name() -> None:
    given = [Contrast(CANDIDATE, "uniform"), Contrast("lfr", "uniform"), Contrast(CANDIDATE, "lfr")]
    assert resolve(given, "lfr") == [Contrast("lfr", "uniform")]
    assert resolve(given, None) == [Contrast("lfr", "uniform")]


def test_minus_the_reference_is_over_the_seeds_that_both_have(results: Results) -> None:
    few = [run for run in results.runs if run.arm != "static" or run.seed in (0, 3)]
    text = make_markdown(summarize(Results(results.study, few, [], 16)))
    table = text.split("### Held-out loss at equal compute")[1].split("###")[0]
    rows = {cells[1].strip(): cells for line in table.splitlines() if len(cells := line.split("|")) > 5}
    assert [cell.strip() for cell in rows["static"][2:5]] == ["3", "4.1100", "−0.0400"], "4.15 of uniform at seed 3"
    assert rows["lfr"][4].strip() == "−0.3200", "the mean of 0.31, 0.32 and 0.33"


def test_arms_of_several_rules_for_junk_are_named(results: Results) -> None:
    def text(rules: dict[tuple[str, int], int]) -> str:
        runs = [
            Result({**run.json, "junk_rule": rules.get((run.arm, run.seed))}, run.arrays_file) for run in results.runs
        ]
        return make_markdown(summarize(Results(results.study, runs, [], 16)))

    assert "Not all junk" not in text({("lfr", 1): RULE, ("best", 1): RULE})
    mixed = text({("lfr", 1): RULE, ("lfr", 2): RULE - 1, ("best", 1): RULE})
    assert f"rule {RULE - 1}: lfr; rule {RULE}: best, lfr." in mixed


def test_an_arm_of_another_budget_decides_nothing(results: Results) -> None:
    study = results.study
    (cell,) = summarize(results)["cells"]
    assert cell["verdict"]["arm"] == "lfr"
    arms = {**study.arms, "lfr": dataclasses.replace(study.arms["lfr"], compute=0.7)}
    (cell,) = summarize(dataclasses.replace(results, study=dataclasses.replace(study, arms=arms)))["cells"]
    assert cell["verdict"]["arm"] != "lfr"
    assert "lfr - uniform" in [row["name"] for row in cell["contrasts"]], "it is compared nevertheless"


def test_an_arm_that_is_as_long_as_its_schedule_decides_nothing(results: Results) -> None:
    """What it computes is its own, whatever the others do."""
    study = results.study
    arms = {**study.arms, "lfr": dataclasses.replace(study.arms["lfr"], length="schedule")}
    summary = summarize(dataclasses.replace(results, study=dataclasses.replace(study, arms=arms)))
    (cell,) = summary["cells"]
    assert cell["verdict"]["arm"] != "lfr"
    adjusted = {row["name"]: row["adjusted_p"] for row in cell["contrasts"]}
    assert adjusted["static - lfr"] is None
    assert adjusted["static - uniform"] is not None
    assert "lfr (as long as its schedule)" in make_markdown(summary)


def test_an_arm_without_a_result_is_missed(results: Results) -> None:
    """Of a planned arm that failed it is not said that it does not pay."""
    runs = [run for run in results.runs if run.arm in ("uniform", "static", "best")]
    worse = dataclasses.replace(results.study, smallest_difference=0.2, candidate=None, primary=())
    for open_runs, kind in (([], "nothing pays"), ([open_run("lfr", 1)], "not decided")):
        (cell,) = summarize(Results(worse, runs, open_runs, 16))["cells"]
        assert cell["verdict"]["kind"] == kind
        assert ("no result yet of lfr" in cell["verdict"]["sentence"]) == bool(open_runs)


def test_an_arm_that_the_reference_is_not_compared_with_is_not_missed(results: Results) -> None:
    contrasts = (Contrast("static", "uniform"), Contrast("lfr", "static"))
    study = dataclasses.replace(results.study, smallest_difference=0.2, candidate=None, primary=(), secondary=contrasts)
    (cell,) = summarize(Results(study, results.runs, [open_run("lfr", 9)], 16))["cells"]
    assert cell["verdict"]["kind"] == "nothing pays"


def test_a_candidate_that_is_not_picked_yet_is_missed(results: Results) -> None:
    """A primary contrast that was not made does not say that it does not pay."""
    study = dataclasses.replace(results.study, smallest_difference=0.2, secondary=(Contrast("static", "uniform"),))
    runs = [run for run in results.runs if run.arm in ("uniform", "static")]
    (cell,) = summarize(Results(study, runs, [open_run("lfr", 0)], 16))["cells"]
    assert cell["verdict"]["kind"] == "not decided"
    assert "no result yet of the candidate, which is not picked yet" in cell["verdict"]["sentence"]


def test_the_seeds_that_picked_the_candidate_are_in_no_contrast(results: Results) -> None:
    """Not where they are the only ones, either; losses are shown."""
    (cell,) = summarize(Results(results.study, [run for run in results.runs if run.seed == 0], [], 16))["cells"]
    assert cell["contrasts"] == []
    assert cell["verdict"]["kind"] == "not decided"
    assert {arm["arm"]: arm["seeds"] for arm in cell["arms"]} == {arm: [0] for arm in GAIN}


def test_the_figures_are_those_that_were_put_in(results: Results) -> None:
    summary = summarize(results)
    (cell,) = summary["cells"]
    assert (summary["candidate"], cell["seeds"]) == ("lfr", [1, 2, 3]), "the candidate's seed is in no contrast"
    contrasts = {row["name"]: row for row in cell["contrasts"]}
    assert list(contrasts) == ["lfr - uniform", "static - uniform", "static - lfr"]
    gain = 0.3 + 0.01 * np.mean([1, 2, 3])
    assert contrasts["lfr - uniform"]["by_seeds"]["mean"] == pytest.approx(-gain)
    assert contrasts["lfr - uniform"]["by_documents"]["mean"] == pytest.approx(-gain, abs=1e-6)
    assert contrasts["lfr - uniform"]["is_primary"]
    assert contrasts["lfr - uniform"]["adjusted_p"] is None
    p = [contrasts[name]["by_seeds"]["p"] for name in ("static - uniform", "static - lfr")]
    assert contrasts["static - uniform"]["adjusted_p"] == pytest.approx(max(p[0] * (2 if p[0] < p[1] else 1), p[0]))

    arms = {arm["arm"]: arm for arm in cell["arms"]}
    equivalents = [math.exp((0.3 + 0.01 * seed) / SLOPE) for seed in (1, 2, 3)]
    assert arms["lfr"]["token_equivalent"]["mean"] == pytest.approx(math.exp(np.mean(np.log(equivalents))))
    assert arms["uniform"]["token_equivalent"]["mean"] == pytest.approx(1.0)
    assert not arms["lfr"]["token_equivalent_beyond"]
    shares = [(0.3 + 0.01 * seed) / (0.4 + 0.01 * seed) for seed in (1, 2, 3)]
    assert arms["lfr"]["share_of_distance"]["mean"] == pytest.approx(np.mean(shares))
    assert arms["lfr"]["tasks"] == {"quiz.jsonl": pytest.approx(-4.0)}
    assert arms["lfr"]["phases"][0]["domains"] == {"easy": 0.25, "hard": 0.75}
    assert arms["lfr"]["forgetting"] == {"steady": 0.25, "learned": 0.75}
    assert cell["verdict"]["kind"] == "pays"
    assert "lfr pays" in cell["verdict"]["sentence"]
    similar = next(row for row in summary["similarity"] if row["arm"] == "lfr")
    assert similar["seeds"] == {"pairs": 6, "cosine": 1.0, "by_chance": 0.5}
    assert similar["sizes"]["pairs"] == 0
    (tau,) = summary["order"]["tau"]
    assert (tau["corpus"], tau["rate"], tau["seeds"]) == ("toy", "cosine", {"pairs": 6, "tau": 1.0})
    answers = [(run.loss, run.json["tasks"]["quiz.jsonl"]["answer_logprob"]) for run in results.runs]
    signs = [np.sign((a - c) * (d - b)) for (a, b), (c, d) in itertools.combinations(answers, 2)]
    untied = sum(b != d for (_, b), (_, d) in itertools.combinations(answers, 2))
    tau = pytest.approx(sum(signs) / math.sqrt(len(signs) * untied))
    assert summary["tasks"] == [{"task": "quiz.jsonl", "runs": 24, "tau": tau}]


def test_the_page_and_the_tables_hold_all_of_it(results: Results) -> None:
    summary = {**summarize(results), "to_do": "train as usual"}
    for text in (make_page(summary), make_markdown(summary)):
        for part in (
            "To do: train as usual.",
            "lfr pays",
            "Token equivalent",
            "share of the way to best",
            "toy.S.cosine.lfr.s9",
            "quiz.jsonl",
        ):
            assert part in text


def test_an_upper_reference_never_pays(results: Results) -> None:
    only = [run for run in results.runs if run.arm in ("uniform", "best")]
    (cell,) = summarize(Results(results.study, only, [], 16))["cells"]
    assert cell["verdict"]["kind"] == "not decided"


def test_a_domain_is_learned_three_quarters_down_its_loss() -> None:
    times = learned_at({"a": [4.0, 2.0, 1.0, 1.5], "b": [None, 3.0, 1.0, None], "c": [1.0, 2.0, 3.0, 4.0]})
    # a: three quarters down is 1.75, a quarter from the middle of the second window to that of the third
    assert times["a"] == pytest.approx((1.5 + 0.25) / 4)
    assert times["b"] == pytest.approx((1.5 + 0.75) / 4)
    assert times["c"] == math.inf


def test_runs_are_compared_within_a_corpus_and_a_rate(results: Results) -> None:
    others = {"corpus": "other"}, {"rate": "late"}, {"size": "M"}
    runs = [run for run in results.runs if run.seed in (1, 2)]
    runs += [Result({**run.json, **other}, run.arrays_file) for run in runs for other in others]
    summary = summarize(Results(results.study, runs, [], 16))
    pairs = {
        (row["corpus"], row["rate"]): [row[name]["pairs"] for name in ("seeds", "sizes", "both")]
        for row in summary["similarity"]
        if row["arm"] == "lfr"
    }
    assert pairs == {("toy", "cosine"): [2, 2, 2], ("other", "cosine"): [1, 0, 0], ("toy", "late"): [1, 0, 0]}
    taus = {(row["corpus"], row["rate"]): row["both"]["pairs"] for row in summary["order"]["tau"]}
    assert taus == {("toy", "cosine"): 2, ("other", "cosine"): 0, ("toy", "late"): 0}
