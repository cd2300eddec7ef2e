"""STUDY.yaml: what is read, and what is refused, with what message."""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megatron_lfr.config.run import resolve_schedule
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.study.definition import CANDIDATE, Contrast, read_study
from megatron_lfr.study.layout import lay_out_study
from support.study_samples import tiny_study, write_study
from support.tiny_corpus import linked

ROOT = Path(__file__).parents[2]
Change = Callable[[dict[str, Any]], Any]
COMMON: dict[str, Any] = {"prepare": {"common": {"commonness": {}}}}
BY_FUNCTION = [
    {"kind": "learn", "duration": 0.5, "unit": "share"},
    {"kind": "focus", "duration": 0.5, "unit": "share", "score": "call:no_such:function"},
]
BY_ARRAY = [{"kind": "learn", "duration": 1, "unit": "share", "weight": "file:w"}]


def put(keys: str, value: Any) -> Change:
    """Return what sets a value: keys are separated by dots."""

    def change(content: dict[str, Any]) -> None:
        *path, last = keys.split(".")
        for key in path:
            content = content[key]
        content[last] = value

    return change


def lay_out(content: dict[str, Any], folder: Path) -> None:
    lay_out_study(read_study(write_study(folder / "study.yaml", content)), folder / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("corporas", {}), "unknown key 'corporas'; did you mean corpora"),
        (put("arms.lfr.setings", {}), "arms: lfr: unknown key 'setings'; did you mean settings?"),
        (put("corpora.toy.labels", {"file": "x.npy"}), "corpora: toy: labels: kinds is missing"),
        (put("arms.lfr.corpus", "toyy"), "arms: lfr: corpus: unknown name 'toyy'; did you mean toy?"),
        (put("reference", "unifrom"), "reference: unknown name 'unifrom'; did you mean uniform?"),
        (put("seeds", [1, 1]), "seeds: [1, 1]: one is given twice"),
        (put("sizes.S", {1: 2}), "sizes: S: 1: expected the name of a setting"),
        (put("candidate", {"among": ["lfr"], "seeds": []}), "candidate: seeds: give at least one"),
        (put("seeds", [True]), "seeds: expected a list of integers of at least 0 and below 2^63, got [True]"),
        (
            put("seeds", [2**63]),
            "expected a list of integers of at least 0 and below 2^63, got [9223372036854775",
        ),
        (put("upper_reference", ["lfr"]), "upper_reference: expected a name, got ['lfr']"),
        (put("arms.lfr.corpus", ["toy"]), "arms: lfr: corpus: expected a name, got ['toy']"),
        (put("arms.uniform.compute", 0.5), "arms: uniform: compute: 0.5: not of an arm that others are compared with"),
        (put("arms.uniform.length", "schedule"), "arms: uniform: length: schedule: not of an arm that others are"),
        (
            put("arms.lfr", {"compute": 0.5, "length": "schedule"}),
            "arms: lfr: compute: 0.5: with length: schedule the schedule says how long it trains",
        ),
        (put("compute", "many"), "compute: expected a positive number, got 'many'"),
        (put("compute", {"M": 1}), "compute: unknown key 'M'; legal: S"),
        (
            put("compute", "1e3"),
            "got '1e3', a text to YAML: with an exponent, it takes numbers with a point and a sign",
        ),
        (put("compute", 10**400), "compute: expected a positive number, got 1000"),
        (
            put("train.data_path", ["x"]),
            "train: data_path: a run trains on a corpus of `corpora`, which an arm may name",
        ),
        (
            put("arms.lfr.settings.data-path", ["x"]),
            "arms: lfr: settings: data_path: a run trains on a corpus of `corp",
        ),
        (put("sizes.S.data_args_path", "x"), "sizes: S: data_args_path: a run trains on a corpus of `corpora`"),
        (put("train.seq-length", 8), "train: seq-length: given twice, with - and with _"),
        (
            put("arms.lfr", False),
            "arms: lfr: expected a mapping with keys settings, corpus, prepare, length, compute, got",
        ),
        (put("arms.lfr.settings", []), "arms: lfr: settings: expected a mapping, got []"),
        (put("rates", False), "rates: expected a mapping, got False"),
        (put("train", 0), "train: expected a mapping, got 0"),
        (put("arms", {True: {}}), "arms: True: a name must be a text; put one that YAML takes for something else"),
        (put("train.seed", 3), "train: seed: is set by the study for every run; leave it out"),
        (put("arms.lfr.length", "long"), "arms: lfr: length: unknown name 'long'; legal: budget, scaled, schedule"),
        (put("contrasts", {"primary": ["lfr - lfr"]}), "primary: lfr - lfr: compares an arm with itself"),
        (put("contrasts", {"primary": ["candidate"]}), "primary: candidate: unknown name 'candidate'"),
        (put("grid", [{"size": ["S"]}]), "grid: 1: unknown key 'size'; did you mean sizes?"),
        (put("held_out", ["no*such"]), "held_out: no*such: no prefix fits"),
        (put("arms.a/b", {}), "arms: 'a/b': a name has letters, digits"),
        (
            put("arms.lfr.prepare", {"losses": {"evaluate": "reference"}}),
            "prepare: losses: evaluate: a train step before this one: unknown name 'reference'",
        ),
        (put("arms.lfr.prepare", {"a": {"train": {}, "commonness": {}}}), "prepare: a: give one of train, evaluate"),
        (
            put("arms.lfr.prepare", {"a": {"commonness": {}}, "b": {"clean": "a", "junk": True}}),
            "prepare: b: junk: needs reference_data_path in the step a",
        ),
        (put("arms.lfr.prepare", {"a": {"train": {"save": "x"}}}), "prepare: a: where results go is set by the study"),
    ],
)
def test_what_is_wrong_is_named(corpus: list[str], tmp_path: Path, change: Change, message: str) -> None:
    content = tiny_study(corpus)
    change(content)
    path = write_study(tmp_path / "study.yaml", content)
    with pytest.raises(ValueError) as caught:
        read_study(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("arms.lfr.settings.lr_deacy_style", "x"), "unknown key 'lr_deacy_style'; did you mean lr_decay_style"),
        (put("sizes.S.num_attention_heads", 3), "--num-attention-heads 3: must divide --hidden-size 16"),
        (put("arms.lfr.settings.lfr_schedule", "lfrr"), "--lfr-schedule lfrr: neither a preset"),
        (put("arms.lfr.settings.lfr_schedule", "lfr-v1"), "say length: scaled"),
        (put("arms.lfr.length", "schedule"), "in shares of the budget, and has no length of its own; leave length out"),
        (put("train.seq_length", "abc"), "--seq-length: invalid literal for int() with base 10: 'abc'"),
        (put("train.tokenizer_model", "nope.json"), "nope.json"),
        (put("train.model_preset", "huge"), "--model-preset huge: choose from"),
        (put("corpora.toy.data_path", ["nothing"]), "--data-path nothing: "),
        (put("held_out", ["nothing"]), "held_out nothing: "),
        (put("train.lr_warmup_iters", 1000), "--lr-warmup-iters 1000: longer than the decay's 62 steps"),
        (put("train.save_retain_steps", [1000]), "--save-retain-steps 1000: must lie between 1 and 62"),
        (put("train.valid_data_path", ["nothing"]), "--valid-data-path nothing: "),
        (put("arms.lfr.settings.lfr_schedule", BY_FUNCTION), "score call:no_such:function: importing no_such fails"),
        (put("compute", 300), "a budget of 300 tokens leaves 2 steps"),
        (put("arms.lfr.settings", {"lfr_schedule": BY_ARRAY}), "a phase needs the array 'w'; given: none"),
        (
            put("arms.lfr.settings", {"lfr_schedule": BY_ARRAY, "lfr_scores": ["w=nothing.npy"]}),
            "lfr_scores w: [Errno 2] No such file or directory: 'nothing.npy'",
        ),
        (
            put("arms.lfr", {**COMMON, "settings": {"lfr_schedule": BY_ARRAY, "lfr_scores": ["w={comn}/w.npy"]}}),
            "lfr_scores w={comn}/w.npy: the steps to choose from are common",
        ),
        (
            put(
                "arms.lfr",
                {**COMMON, "settings": {"lfr_schedule": BY_ARRAY, "lfr_scores": ["w={common}/block_ratio.npy"]}},
            ),
            "block_ratio.npy: of this step, choose from commonness/block_copies.npy, commonness/block_near_copies.npy",
        ),
        (put("tasks", ["short.jsonl"]), "tasks are text, and need a tokenizer_model"),
        (
            put(
                "arms.lfr",
                {
                    "prepare": {**COMMON["prepare"], "corpus": {"clean": "common"}},
                    "settings": {"lfr_schedule": BY_ARRAY, "lfr_scores": ["w={common}/w.npy"]},
                },
            ),
            "lfr_scores w: is of the corpus before cleaning, which has other blocks",
        ),
        (
            put(
                "arms.lfr",
                {
                    "prepare": {**COMMON["prepare"], "corpus": {"clean": "common"}},
                    "settings": {"lfr_schedule": "lfr-v1"},
                    "length": "schedule",
                },
            ),
            "length: schedule after clean: how long an epoch is, is known after cleaning",
        ),
    ],
)
def test_what_train_would_refuse_is_refused_before_anything_runs(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, message: str
) -> None:
    content = tiny_study(corpus)
    monkeypatch.chdir(tmp_path)
    Path("short.jsonl").write_text('{"context": "a", "target": " b"}')
    change(content)
    with pytest.raises(ValueError, match=r"arms: (lfr|uniform) \(size S, rate cosine\)") as caught:
        lay_out(content, tmp_path)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("arms.lfr.prepare", {"c": {"commonness": {"near_threshold": 0.1}}}), "--near-threshold 0.1: must be from"),
        (put("arms.lfr.prepare", {"c": {"commonness": {"junk_share": 0.1}}}), "--junk-share 0.1: needs --reference-d"),
        (put("arms.lfr.prepare", {"c": {"commonness": {"threads": None}}}), "threads: has no value; leave the key out"),
        (put("arms.lfr.prepare", {"c": {"commonness": {"threads": 1.5}}}), "--threads: invalid literal for int() with"),
        (
            put("arms.lfr.prepare", {"c": {"commonness": {"memory_gb": "x"}}}),
            "--memory-gb: could not convert string",
        ),
        (put("arms.lfr.prepare", {"c": {"commonness": {"seq_length": 8}}}), "prepare: c: unknown key 'seq_length'"),
        (put("arms.lfr.prepare", {"c": {"commonness": {"thread": 1}}}), "unknown key 'thread'; did you mean threads"),
        (
            put("arms.lfr.prepare", {"c": {"commonness": {"reference_data_path": ["nothing"]}}}),
            "--reference-data-path nothing: nothing.idx: no such file",
        ),
        (put("candidate", {"among": ["lfr"], "seeds": [7]}), "candidate: needs the run toy.S.cosine.lfr.s7, which is"),
        (put("compute_points", [1, 1.5, 1.5000001]), "compute_points: 1.5000001 and 1.5 are one to six digits"),
        (put("arms.lfr.settings.seq_length", 8), "toy.S.cosine.lfr.s1: its seq_length is 8, that of toy.S.cosine.unif"),
    ],
)
def test_what_runs_could_not_be_compared_by_is_refused(
    corpus: list[str], tmp_path: Path, change: Change, message: str
) -> None:
    content = tiny_study(corpus)
    change(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        lay_out(content, tmp_path)


def test_tasks_that_cannot_be_scored_are_refused_before_anything_runs(corpus: list[str], tmp_path: Path) -> None:
    content = tiny_study(corpus)
    del content["train"]["vocab_size"]
    content["train"]["tokenizer_model"] = "bytes"
    task = tmp_path / "task.jsonl"
    content["tasks"] = [str(task), str(task)]
    task.write_text('{"context": "a", "target": " b"}\n{"context": "a", "target": " b and quite some more"}\n')
    with pytest.raises(ValueError, match=r"tasks: .*task.jsonl is given twice"):
        lay_out(content, tmp_path)
    content["tasks"].pop()
    with pytest.raises(ValueError, match=r"arms: uniform .*task.jsonl:2: a continuation of 22 tokens; --seq-length of"):
        lay_out(content, tmp_path)
    task.write_text('{"context": "a", "target": " b"}\n')
    lay_out(content, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"valid_data_path": ["nothing"]}, "--valid-data-path nothing: "),
        ({"tokenizer_model": "nope.json"}, "nope.json"),
        ({"lfr_schedule": BY_ARRAY}, "lfr_scores: a phase needs the array 'w'; given: none"),
        (
            {"lfr_schedule": BY_ARRAY, "lfr_scores": ["w=nothing.npy"]},
            "lfr_scores w: [Errno 2] No such file or directory: 'nothing.npy'",
        ),
        (
            {"lfr_schedule": BY_ARRAY, "lfr_scores": ["w={common}/block_weight.npy"]},
            "lfr_scores w={common}/block_weight.npy: the steps to choose from are none",
        ),
    ],
)
def test_a_model_before_the_runs_is_checked_as_they_are(
    corpus: list[str], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    content = tiny_study(corpus)
    reference = {"train": {"data_path": [corpus[0]], "train_iters": 5, **settings}}
    content["arms"]["lfr"]["prepare"] = {**COMMON["prepare"], "reference": reference}
    with pytest.raises(ValueError, match=r"arms: lfr: prepare: reference: ") as caught:
        lay_out(content, tmp_path)
    assert message in str(caught.value)


def test_the_text_that_decides_is_in_no_corpus_by_whatever_name(corpus: list[str], tmp_path: Path) -> None:
    content = tiny_study(corpus)
    content["held_out"] = [linked(corpus[0], tmp_path / "links")]
    with pytest.raises(ValueError, match=r"held_out .*links/other: is in data_path; give text that is not"):
        lay_out(content, tmp_path)


def test_labels_of_blocks_do_not_go_with_cleaning(corpus: list[str], tmp_path: Path) -> None:
    content = tiny_study(corpus)
    labels = tmp_path / "labels.npy"
    np.save(labels, np.zeros(BlockDataset(corpus, 16, "1").train.num_blocks, np.int64))
    content["corpora"]["toy"]["labels"] = {"file": str(labels), "of": "blocks", "kinds": ["a"]}
    lay_out(content, tmp_path)
    content["arms"]["lfr"]["prepare"] = {**COMMON["prepare"], "corpus": {"clean": "common"}}
    with pytest.raises(ValueError, match="labels of blocks do not say what a cleaned corpus holds"):
        lay_out(content, tmp_path)


def test_a_pattern_stands_for_prefixes_in_order_of_names(corpus: list[str], tmp_path: Path) -> None:
    content = tiny_study(corpus)
    content["held_out"] = [content["held_out"][0].replace("easy", "*")]
    study = read_study(write_study(tmp_path / "study.yaml", content))
    assert list(study.held_out) == tiny_study(corpus)["held_out"]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (np.full(20, 1, np.float32), "array w: has the shape [20], but there are "),
        (np.full(400, np.nan, np.float32), "must be a finite number"),
        (np.ones(400, np.uint32), "array w: is of type uint32, must be float32"),
    ],
)
def test_numbers_that_train_would_refuse_are_refused_before_anything_runs(
    corpus: list[str], tmp_path: Path, numbers: npt.NDArray[np.number], message: str
) -> None:
    content, blocks = tiny_study(corpus), BlockDataset(corpus, 16, "100,0,0").train.num_blocks
    np.save(tmp_path / "w.npy", numbers[:blocks])
    content["arms"]["lfr"]["settings"] = {"lfr_schedule": BY_ARRAY, "lfr_scores": [f"w={tmp_path / 'w.npy'}"]}
    with pytest.raises(ValueError, match=r"arms: lfr \(size S, rate cosine\): lfr_scores: phase 0: ") as caught:
        lay_out(content, tmp_path)
    assert message in str(caught.value)


def test_what_decides_is_not_trained_on(corpus: list[str], tmp_path: Path) -> None:
    held_out = tiny_study(corpus)["held_out"][1]
    trained = {"reference": {"train": {"data_path": [held_out], "train_iters": 5}}}
    trusted = {"common": {"commonness": {"reference_data_path": [held_out]}}}
    of_corpus = {"common": {"commonness": {"reference_data_path": [corpus[0]]}}}
    for change, message in (
        (
            put("corpora.toy.data_path", [corpus[0], held_out]),
            f"arms: uniform (size S, rate cosine): held_out {held_out}: is in data_path; give text that is not",
        ),
        (put("arms.lfr.prepare", trained), f"prepare: reference: held_out {held_out}: is in data_path"),
        (put("arms.lfr.prepare", trusted), f"prepare: common: held_out {held_out}: is in --reference-data-path"),
        (put("arms.lfr.prepare", of_corpus), f"prepare: common: --reference-data-path {corpus[0]}: is in --data-path"),
    ):
        changed = tiny_study(corpus)
        change(changed)
        with pytest.raises(ValueError, match=re.escape(message)):
            lay_out(changed, tmp_path)


@pytest.fixture
def in_prepared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a folder with the names of what studies/prepare.sh makes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for corpus in ("redundant", "clean", "held_out", "trusted"):
        (tmp_path / "data" / f"{corpus}_a_text_document.idx").touch()


@pytest.mark.usefixtures("in_prepared_folder")
@pytest.mark.parametrize("name", ["study", "small", "smoke"])
def test_the_studies_of_this_repository_are_legal(name: str) -> None:
    """Their names, arms and schedules; their corpora are made elsewhere."""
    study = read_study(ROOT / "studies" / f"{name}.yaml")
    trained = {arm for block in study.grid for arm in block.arms}
    assert {study.reference, study.upper_reference} <= trained
    contrasted = {arm for one in (*study.primary, *study.secondary) for arm in (one.arm, one.against)}
    assert contrasted - {CANDIDATE} <= trained
    for arm in trained:
        schedule = study.arms[arm].settings["lfr_schedule"]
        resolve_schedule(schedule if isinstance(schedule, str) else json.dumps(schedule))


@pytest.mark.usefixtures("in_prepared_folder")
def test_what_the_questions_of_the_replication_run_is_in_its_grid() -> None:
    grid = read_study(ROOT / "studies/study.yaml").grid
    names = [
        ".".join([*cell, f"s{seed}"])
        for block in grid
        for cell in itertools.product(block.corpora, block.sizes, block.rates, block.arms)
        for seed in block.seeds
    ]
    table = (ROOT / "studies/README.md").read_text(encoding="utf-8").split("| question |")[1].split("\n\n")[0]
    rows = [re.findall(r"'([\w.*?\[\]-]+)'", row) for row in table.splitlines()[2:]]
    assert len(rows) > 10
    for patterns in rows:
        assert [pattern for pattern in patterns if not fnmatch.filter(names, pattern)] == []
        chosen = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
        for corpus, size, rate, _, seed in (name.split(".") for name in chosen):
            assert f"{corpus}.{size}.{rate}.uniform.{seed}" in chosen, "all is compared with uniform"


def test_all_other_arms_are_secondary_contrasts_by_default(corpus: list[str], tmp_path: Path) -> None:
    content = tiny_study(corpus)
    content["arms"]["static"] = {"settings": {"lfr_schedule": "static"}}
    content["candidate"] = {"among": ["lfr", "static"], "seeds": [1]}
    content["contrasts"] = {"primary": ["candidate", "static"]}
    study = read_study(write_study(tmp_path / "study.yaml", content))
    assert study.primary == (Contrast("candidate", "uniform"), Contrast("static", "uniform"))
    assert study.secondary == (Contrast("lfr", "uniform"),)


def test_labels_that_do_not_fit_are_refused_before_anything_runs(corpus: list[str], tmp_path: Path) -> None:
    content = tiny_study(corpus)
    (tmp_path / "labels.txt").write_text("a\n")
    content["corpora"]["toy"]["labels"] = {"file": str(tmp_path / "labels.txt"), "kinds": ["a"]}
    study = read_study(write_study(tmp_path / "study.yaml", content))
    with pytest.raises(ValueError, match=r"corpora: toy: labels: .*labels.txt: holds 1 labels, but there are 80"):
        lay_out_study(study, tmp_path / "out")
