"""Runs of equal compute, counted again by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.data.corpus.block_values import write_description
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.lfr import PRESETS, Schedule, preset
from megatron_lfr.study.beginnings import find_beginnings
from megatron_lfr.study.budget import plain_phase
from megatron_lfr.study.definition import read_study
from megatron_lfr.study.layout import Layout, PlannedRun, lay_out_study
from megatron_lfr.study.runner import run_study, runs_to_train
from support.study_samples import tiny_study, write_study

STEP = 8 * 16
"""Tokens of an optimizer step."""


def token_flops(
    hidden: int, ffn: int, heads: int, layers: int = 1, vocabulary: int = 64, seq_length: int = 16
) -> float:
    """FLOPs of training on a token, of a model whose heads all have keys: 6 a weight, and causal attention."""
    weights = layers * (4 * hidden * hidden + 3 * hidden * ffn) + vocabulary * hidden
    return 6 * weights + 12 * layers * heads * (hidden // heads) * (seq_length + 1) / 2


@pytest.fixture
def layout(corpus: list[str], tmp_path: Path) -> Layout:
    content = tiny_study(corpus)
    content["sizes"]["M"] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}
    content["compute"] = {"S": 30_000, "M": 60_000}
    content["compute_points"] = [0.5, 1.5]
    content["arms"]["rescored"] = {
        "settings": {
            "lfr_schedule": [
                {"kind": "learn", "duration": 0.5, "unit": "share"},
                {"kind": "focus", "duration": 0.25, "unit": "share", "drop": 0.5, "score": "rescored"},
                {"kind": "review", "duration": 0.25, "unit": "share"},
            ]
        }
    }
    content["arms"]["excess"] = {
        "prepare": {
            "reference": {"train": {"data_path": [corpus[0]], "train_iters": 20}, "size": "S"},
            "losses": {"evaluate": "reference"},
        },
        "settings": {"lfr_schedule": "lfr", "tensorboard_dir": "{losses}"},
    }
    content["arms"]["v1"] = {"settings": {"lfr_schedule": "lfr-v1"}, "length": "scaled"}
    content["arms"]["v1-as-it-is"] = {"settings": {"lfr_schedule": "lfr-v1"}, "length": "schedule"}
    return lay_out_study(read_study(write_study(tmp_path / "study.yaml", content)), tmp_path / "out")


def run(layout: Layout, arm: str, size: str = "S", seed: int = 1, point: str = "") -> PlannedRun:
    return layout.runs[f"toy.{size}.cosine.{arm}.s{seed}{point}"]


def test_every_run_of_a_cell_computes_the_budget_up_to_a_step(layout: Layout) -> None:
    for planned in layout.runs.values():
        if planned.arm != "v1-as-it-is":
            budget = {"S": 30_000, "M": 60_000}[planned.size] * planned.compute_point
            assert budget - STEP < planned.compute.total <= budget
            assert planned.compute.training == planned.steps * STEP == planned.settings["train_iters"] * STEP


def test_only_the_reference_has_compute_points(layout: Layout) -> None:
    points = {(planned.arm, planned.compute_point) for planned in layout.runs.values()}
    assert {point for arm, point in points if arm == "uniform"} == {0.5, 1.0, 1.5}
    assert {point for arm, point in points if arm != "uniform"} == {1.0}
    assert run(layout, "uniform", point=".x0.5").steps == 30_000 // 2 // STEP


def test_an_arm_may_have_a_share_of_the_budget(corpus: list[str], tmp_path: Path) -> None:
    content = tiny_study(corpus)
    content["arms"]["less"] = {"compute": 0.7, "settings": {"lfr_schedule": "uniform"}}
    layout = lay_out_study(read_study(write_study(tmp_path / "study.yaml", content)), tmp_path / "out")
    uniform, less = run(layout, "uniform"), run(layout, "less")
    assert (uniform.steps, less.steps) == (8000 // STEP, 5600 // STEP)
    assert (less.compute.budget, less.compute_point) == (pytest.approx(5600), 1.0)
    content["arms"]["less"]["compute"] = 0
    with pytest.raises(ValueError, match=r"arms: less: compute: expected a positive number, got 0"):
        read_study(write_study(tmp_path / "study.yaml", content))


def test_rescoring_costs_a_third_of_a_pass(layout: Layout, corpus: list[str]) -> None:
    blocks = BlockDataset(corpus, 16, "1").train.num_blocks
    compute = run(layout, "rescored").compute
    assert compute.rescoring == pytest.approx(blocks * 16 / 3)
    assert compute.training == int((30_000 - blocks * 16 / 3) // STEP) * STEP


def test_a_reference_costs_its_training_and_a_forward_pass_in_the_units_of_the_run(
    layout: Layout, corpus: list[str]
) -> None:
    blocks = BlockDataset(corpus, 16, "1").train.num_blocks
    small, large = token_flops(16, 32, 2), token_flops(32, 64, 4, layers=2)
    flops = (20 * STEP + blocks * 16 / 3) * small
    assert run(layout, "excess").compute.preparation == pytest.approx(flops / small)
    assert run(layout, "excess", "M").compute.preparation == pytest.approx(flops / large)
    assert len(layout.steps) == 2, "one reference for both sizes and all seeds"


def test_outputs_of_steps_are_put_in_the_places_of_their_names(layout: Layout, tmp_path: Path) -> None:
    (losses,) = (step for step in layout.steps.values() if step.step.kind == "evaluate")
    assert run(layout, "excess").settings["tensorboard_dir"] == str(losses.output)
    assert losses.output.parent.parent == tmp_path / "out" / "prepared"


def test_a_scaled_schedule_keeps_its_proportions(layout: Layout) -> None:
    natural, scaled = run(layout, "v1-as-it-is"), run(layout, "v1")
    lengths = [phase["duration"] for phase in scaled.settings["lfr_schedule"]]
    assert sum(lengths) == scaled.steps == 30_000 // STEP
    # Of lfr-v1: an epoch, half of one, an epoch, five times 30 % of one
    assert [length / scaled.steps for length in lengths] == pytest.approx([0.25, 0.125, 0.25, 0.375], abs=0.01)
    assert natural.compute.training != natural.compute.budget


def test_digests_differ_with_what_is_trained_but_not_with_where(corpus: list[str], tmp_path: Path) -> None:
    def digests(folder: str, lr: float) -> set[str]:
        content = tiny_study(corpus)
        content["rates"]["cosine"]["lr"] = lr
        layout = lay_out_study(read_study(write_study(tmp_path / "study.yaml", content)), tmp_path / folder)
        return {planned.digest for planned in layout.runs.values()}

    assert len(digests("a", 0.01)) == 4
    assert digests("a", 0.01) == digests("b", 0.01)
    assert digests("a", 0.01).isdisjoint(digests("a", 0.02))


def test_a_given_file_of_scores_costs_what_it_says(corpus: list[str], tmp_path: Path) -> None:
    """Its FLOPs come off the budget, and a digest covers the numbers; one of another corpus is refused."""
    content = tiny_study(corpus)
    phases = [{"kind": "learn", "duration": 1, "unit": "share", "weight": "file:w"}]
    path = tmp_path / "w.npy"
    content["arms"]["given"] = {"settings": {"lfr_schedule": phases, "lfr_scores": [f"w={path}"]}}
    blocks, flops = BlockDataset(corpus, 16, "100,0,0"), token_flops(16, 32, 2)

    def lay_out(values: float, corpus_digests: list[str], cost: object = 3000 * flops) -> PlannedRun:
        np.save(path, np.full(blocks.train.num_blocks, values, np.float32))
        write_description(path, corpus_digests, "losses", flops=cost)
        study = read_study(write_study(tmp_path / "study.yaml", content))
        return run(lay_out_study(study, tmp_path / "out"), "given")

    one, other = lay_out(1.0, blocks.digests()), lay_out(2.0, blocks.digests())
    assert one.compute.preparation == pytest.approx(3000)
    assert one.compute.training == (8000 - 3000) // STEP * STEP
    assert one.digest != other.digest
    with pytest.raises(ValueError, match=r"arms: given .*lfr_scores w=.*: was made of another corpus"):
        lay_out(1.0, BlockDataset(corpus, 16, "90,10,0").digests())
    by_name = lay_out(1.0, blocks.digests(), {"training": 2000 * flops, "forward": 500 * flops})
    assert by_name.compute.preparation == pytest.approx(2500)
    for cost in (
        None,
        {"training": None, "forward": flops},
        {"training": -1},
        {"training": 10**400},
        "many",
        [1],
        True,
    ):
        with pytest.raises(ValueError, match=r"arms: given .*lfr_scores w=.*: its description says (flops|training): "):
            lay_out(1.0, blocks.digests(), cost)


def test_a_file_of_scores_is_counted_once_and_with_the_model_that_is_trained_with_it(
    corpus: list[str], tmp_path: Path
) -> None:
    content = tiny_study(corpus)
    path, blocks, flops = tmp_path / "w.npy", BlockDataset(corpus, 16, "100,0,0"), token_flops(16, 32, 2)
    twice = [{"kind": "learn", "duration": 0.5, "unit": "share", "weight": f"file:{name}"} for name in ("a", "b")]
    given = {"lfr_schedule": twice, "lfr_scores": [f"a={path}", f"b={path}"]}
    reference = {"train": {"train_iters": 5, **given}}
    content["arms"]["given"] = {"settings": given}
    content["arms"]["model"] = {"prepare": {"reference": reference}, "settings": {"lfr_schedule": "uniform"}}
    content["arms"]["both"] = {"prepare": {"reference": reference}, "settings": given}

    def lay_out(value: float) -> Layout:
        np.save(path, np.full(blocks.train.num_blocks, value, np.float32))
        write_description(path, blocks.digests(), "losses", flops=3000 * flops)
        return lay_out_study(read_study(write_study(tmp_path / "study.yaml", content)), tmp_path / "out")

    layout = lay_out(1.0)
    assert run(layout, "given").compute.preparation == pytest.approx(3000)
    for arm in ("model", "both"):
        assert run(layout, arm).compute.preparation == pytest.approx(3000 + 5 * STEP)
        assert run(layout, arm).given_flops == pytest.approx(3000 * flops)
    (step,) = layout.steps.values()
    assert step.costs.flops == pytest.approx(640 * flops), "what is done already is not to be done again"
    assert lay_out(2.0).steps.keys().isdisjoint(layout.steps), "a model of other numbers is another one"


def test_clusters_may_be_given_by_their_flag(corpus: list[str], tmp_path: Path) -> None:
    """They are a file of scores: of the identity of a run, and of the beginnings that runs have in common."""
    content, file = tiny_study(corpus), tmp_path / "clusters.npy"
    np.save(file, np.arange(BlockDataset(corpus, 16, "1").train.num_blocks, dtype=np.uint32) % 4)
    by = {"flag": {"lfr_clusters": str(file)}, "named": {"lfr_scores": [f"clusters={file}"]}}
    focus = {"kind": "focus", "drop": 0.5, "selection": "clusters", "cluster_by": "file:clusters"}
    for arm, kinds in (("flag", ("learn", "review")), ("named", ("learn", "learn"))):
        phases = [{"kind": "learn"}, focus, *({"kind": kind} for kind in kinds)]
        schedule = [{**phase, "duration": 0.25, "unit": "share"} for phase in phases]
        content["arms"][arm] = {"settings": {"lfr_schedule": schedule, **by[arm]}}
    content["seeds"] = [1]
    layout = lay_out_study(read_study(write_study(tmp_path / "study.yaml", content)), tmp_path / "out")
    names = [run(layout, arm).name for arm in by]
    beginnings = find_beginnings(layout.runs.values(), tmp_path / "out").values()
    (shared,) = (one for one in beginnings if list(one.runs) == names)
    for settings in (shared.settings, *(run(layout, arm).settings for arm in by)):
        assert settings["lfr_scores"] == [f"clusters={file}"]
        assert "lfr_clusters" not in settings


def test_runs_that_are_the_same_have_one_result(corpus: list[str], tmp_path: Path) -> None:
    """uniform on one corpus is what an arm of the other one trains."""
    content = tiny_study(corpus)
    content["corpora"]["part"] = {"data_path": [corpus[0]]}
    content["arms"]["of-part"] = {"corpus": "part", "settings": {"lfr_schedule": "uniform"}}
    content["grid"] = [{"corpora": ["toy"], "arms": ["of-part"]}, {"corpora": ["part"], "arms": ["uniform"]}]
    study, out = read_study(write_study(tmp_path / "study.yaml", content)), tmp_path / "out"
    layout = lay_out_study(study, out)
    first, same = run(layout, "of-part"), layout.runs["part.S.cosine.uniform.s1"]
    assert first.digest == same.digest != run(layout, "of-part", seed=2).digest
    everything = list(layout.runs.values())
    assert runs_to_train(everything, {}) == [one for one in everything if one.arm == "of-part"]
    assert runs_to_train([same, first], {}) == [same]
    assert runs_to_train(everything, {first.digest}) == [run(layout, "of-part", seed=2)]
    (out / "results").mkdir(parents=True)
    made = {"name": first.name, "arm": "of-part", "digest": first.digest, "arrays": "its.npz"}
    results = out / "results"
    (results / f"{first.name}.json").write_text(json.dumps(made))
    np.savez(results / "its.npz", held_out=np.zeros(3, np.float32))
    assert run_study(study, layout, out, [first, same], [{}]) == []
    shared = json.loads((results / f"{same.name}.json").read_text())
    assert (shared["name"], shared["arm"], shared["corpus"]) == (same.name, "uniform", "part")
    assert shared["arrays"] == f"{same.name}.npz"
    assert (results / shared["arrays"]).read_bytes() == (results / "its.npz").read_bytes()

    # One that is damaged is not shared, and a damaged one is made of the other.
    (results / f"{same.name}.json").unlink()
    (results / "its.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=f"{first.name}.json: its arrays, its.npz, are not there or damaged"):
        run_study(study, layout, out, [first, same], [{}])
    (results / f"{first.name}.json").unlink()
    (results / f"{same.name}.json").write_text(json.dumps(shared))
    assert run_study(study, layout, out, [first, same], [{}]) == []
    assert json.loads((results / f"{first.name}.json").read_text())["arrays"] == f"{first.name}.npz"


def test_digests_differ_with_the_files_that_a_run_reads(corpus: list[str], tmp_path: Path) -> None:
    content = tiny_study(corpus)
    schedule, labels, trusted = (tmp_path / name for name in ("schedule.yaml", "labels.txt", "trusted"))
    content["corpora"]["toy"]["labels"] = {"file": str(labels), "kinds": ["a", "b"]}
    content["arms"] = {
        "uniform": content["arms"]["uniform"],
        "file": {"settings": {"lfr_schedule": str(schedule)}},
        "cleaned": {
            "prepare": {"c": {"commonness": {"reference_data_path": [str(trusted)]}}, "corpus": {"clean": "c"}},
            "settings": {"lfr_schedule": "uniform"},
        },
    }
    documents = sum(dataset.num_documents for dataset in BlockDataset(corpus, 16, "1").datasets)

    def digests(kind: str, drop: float, token: int) -> dict[str, str]:
        labels.write_text("a\n" * (documents - 1) + f"{kind}\n")
        schedule.write_text(
            f"[{{kind: learn, duration: 0.5, unit: share}}, {{kind: focus, duration: 0.5, unit: share, drop: {drop}}}]"
        )
        with IndexedDatasetWriter(trusted, np.dtype(np.uint16)) as writer:
            writer.add_document(np.full(40, token, np.uint16))
        study = read_study(write_study(tmp_path / "study.yaml", content))
        runs = lay_out_study(study, tmp_path / "out").runs.values()
        return {planned.arm: planned.digest for planned in runs if planned.seed == 1}

    def changed(kind: str, drop: float, token: int) -> set[str]:
        return {arm for arm, digest in digests(kind, drop, token).items() if digest != before[arm]}

    before = digests("a", 0.3, 1)
    assert changed("a", 0.3, 1) == set()
    assert changed("a", 0.4, 1) == {"file"}
    assert changed("a", 0.3, 2) == {"cleaned"}
    assert changed("b", 0.3, 1) == {"uniform", "file", "cleaned"}


def test_digests_differ_with_what_a_preset_means(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tiny_study(corpus)
    content["seeds"] = [1]
    content["arms"] = {
        "uniform": content["arms"]["uniform"],
        "lfr": {"settings": {"lfr_schedule": "lfr"}},
        "excess": {
            "prepare": {
                "reference": {"train": {"data_path": corpus[:1], "train_iters": 20, "lfr_schedule": "lfr"}},
                "losses": {"evaluate": "reference"},
            },
            "settings": {"lfr_schedule": "uniform"},
        },
        "list": {"settings": {"lfr_schedule": [plain_phase(phase) for phase in preset("lfr").phases]}},
    }

    def digests() -> dict[str, str]:
        layout = lay_out_study(read_study(write_study(tmp_path / "study.yaml", content)), tmp_path / "out")
        return {planned.arm: planned.digest for planned in layout.runs.values()}

    before = digests()
    assert before["list"] == before["lfr"] != before["uniform"]
    text, schedule = PRESETS["lfr"]
    milder = tuple(replace(phase, drop=phase.drop / 2) for phase in schedule.phases)
    monkeypatch.setitem(PRESETS, "lfr", (text, Schedule(milder)))
    assert {arm for arm, digest in digests().items() if digest != before[arm]} == {"lfr", "excess"}


def test_a_corpus_that_is_yet_to_be_cleaned_may_be_small_enough(corpus: list[str], tmp_path: Path) -> None:
    """Improvement needs blocks that come twice: of the corpus as it is none is certain to, of the cleaned one it is not
    known."""
    content = tiny_study(corpus)
    blocks = BlockDataset(corpus, 16, "1").train.num_blocks
    content["compute"] = int(1.2 * blocks) * 16
    content["arms"] = {"uniform": content["arms"]["uniform"]}
    schedule = [
        {"kind": "learn", "duration": 0.6, "unit": "share"},
        {"kind": "focus", "duration": 0.4, "unit": "share", "drop": 0.3, "score": "improvement"},
    ]
    content["arms"]["falls"] = {"settings": {"lfr_schedule": schedule}}
    with pytest.raises(ValueError, match="score improvement needs blocks that have been trained on twice"):
        lay_out_study(read_study(write_study(tmp_path / "study.yaml", content)), tmp_path / "out")
    content["arms"]["falls"]["prepare"] = {"common": {"commonness": {}}, "corpus": {"clean": "common"}}
    layout = lay_out_study(read_study(write_study(tmp_path / "study.yaml", content)), tmp_path / "out")
    assert len(run(layout, "falls").plan.phases) == 2
